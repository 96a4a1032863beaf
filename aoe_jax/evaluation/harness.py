"""Adapts a model to EleutherAI's lm-eval. This needs the package `lm-eval`, but not torch.

The tokenisation follows lm-eval's `hf` backend, so that both compute the same log-likelihoods.
"""

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from aoe_jax.errors import UserError
from aoe_jax.evaluation.generation import Generator, Sampling
from aoe_jax.evaluation.log_likelihoods import Scorer

GENERATED_TOGETHER = 16  # prompts per batch
_CHUNK = 16  # tokens generated between two searches for the `until` strings


class HarnessModel(TemplateLM):
    """Implements lm-eval's model class; every process gets all requests and returns all results."""

    def __init__(self, model):
        """Raises `UserError` if scores of a text depend on padding, other texts or later tokens."""
        super().__init__()
        self._model, self._tokenizer = model, model.tokenizer
        self._scorer, self._generator = Scorer(model), None

    @property
    def eot_token_id(self):
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self):
        return self._model.start

    @property
    def max_length(self):
        return self._model.config.model.max_len

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Tokenises a text, with `Model.prefix` in front unless `add_special_tokens` is False."""
        (tokens,) = self._tokenizer.encode([string])
        prefix = [] if add_special_tokens is False else self._model.prefix
        return [*prefix, *tokens.tolist()]

    def _encode_pair(self, context, continuation):
        context_tokens, tokens = super()._encode_pair(context, continuation)
        context_tokens = context_tokens or [self.prefix_token_id]  # the text has only spaces
        if tokens or not continuation:
            return context_tokens, tokens
        # The continuation adds no token to the context's tokens, so it is encoded alone.
        return context_tokens, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._scorer(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        windows = []  # for each text, (context, continuation) pairs that score each token once
        for request in requests:
            tokens, settings = self.tok_encode(*request.args), (self.max_length, 1)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, *settings)
            windows.append([make_disjoint_window(window) for window in rolling])
        flat = [window for of_text in windows for window in of_text]
        scores = iter(self._scorer(flat))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests, disable_tqdm=False):
        """Returns the continuation of each context, cut before the first of its `until` strings.

        The first tokens of a context that is too long are dropped. Draws are the same in every run.
        Raises `UserError` if a task wants `model.max_len` tokens or more, or has unknown settings.
        """
        arguments = [request.args for request in requests]
        ordered = Collator(
            [(self.tok_encode(text) or [self.prefix_token_id], given) for text, given in arguments],
            sort_fn=lambda request: len(request[0]),
            group_fn=lambda request: request[1],
            group_by="gen_kwargs",
        )
        texts, settings = [], {"unit": "text", "leave": False, "disable": jax.process_index() > 0}
        with tqdm(total=len(requests), desc="generating", **settings) as bar:
            for seed, batch in enumerate(ordered.get_batched(n=GENERATED_TOGETHER)):
                prompts, given = zip(*batch, strict=True)
                texts += self._generate(prompts, given[0], seed)
                bar.update(len(batch))
        return ordered.get_original(texts)

    def _generate(self, prompts, settings, seed):
        settings = normalize_gen_kwargs(settings, min(256, self.max_length // 2))
        until, max_tokens = settings.pop("until"), settings.pop("max_gen_toks")
        do_sample, temperature = settings.pop("do_sample"), settings.pop("temperature", 0.0)
        top = {name: settings.pop(name, None) for name in ("top_k", "top_p")}
        if settings:
            known = "until, max_gen_toks, do_sample, temperature, top_k and top_p"
            raise UserError(f"the task asks to generate with {settings}; use only {known}")
        kept = self.max_length - max_tokens
        sampling = Sampling(temperature, **top) if do_sample and temperature else Sampling(0.0)
        until = [text for text in until if text]
        # `longest` is in bytes: a text has at most as many tokens as bytes.
        longest = max((len(end.encode()) for end in until), default=0)

        def is_done(tokens):
            text = self._tokenizer.decode(tokens[-_CHUNK - longest :])
            return any(end in text for end in until)

        self._generator = self._generator or Generator(self._model)
        drawing = {"sampling": sampling, "seed": seed, "chunk": _CHUNK, "is_done": is_done}
        prompts = [prompt[-kept:] for prompt in prompts]
        generated = self._generator.generate(prompts, max_tokens, **drawing)
        texts = map(self._tokenizer.decode, generated)
        return [postprocess_generated_text(text, until, None) for text in texts]

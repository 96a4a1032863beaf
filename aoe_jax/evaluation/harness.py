"""A model for EleutherAI's lm-eval; importing this needs the package `lm-eval`, and no torch.

Texts become tokens as in its `hf` backend, so that both give the same log-likelihoods.
"""

import math

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from aoe_jax.errors import UserError
from aoe_jax.evaluation.generation import Generator, Sampling
from aoe_jax.evaluation.scoring import Scorer

GENERATED_TOGETHER = 16  # prompts of a batch
_CHUNK = 16  # tokens between two looks at what has come


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model. Every process of a run is given all requests, and has all
    results.
    """

    def __init__(self, model, progress=True):
        """Takes a `models.Model`; raises what `Scorer` does.

        `progress` shows bars on stderr.
        """
        super().__init__()
        self._model, self._tokenizer, self._progress = model, model.tokenizer, progress
        self._scorer, self._generator = Scorer(model), None

    @property
    def eot_token_id(self):
        """The token that ends a text."""
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self):
        """What comes before the first token of a text."""
        return self._model.start

    @property
    def max_length(self):
        """Tokens that the model takes at once."""
        return self._scorer.max_len

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Token ids of a text, a list; before them the special ones of the tokenizer, unless
        `add_special_tokens=False`.
        """
        (tokens,) = self._tokenizer.encode([string])
        prefix = [] if add_special_tokens is False else self._model.prefix
        return [*prefix, *tokens.tolist()]

    def _encode_pair(self, context, continuation):
        """Where the last token of the context takes in the whole continuation, which then had none:
        each by itself.
        """
        context_tokens, tokens = super()._encode_pair(context, continuation)
        if tokens or not continuation:
            return context_tokens, tokens
        return context_tokens, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """`[(texts, context tokens, continuation tokens)]` -> `[(log-likelihood, whether greedy
        decoding gives it)]`.
        """
        return self._scorer(
            [request[1:] for request in requests], self._progress and not disable_tqdm
        )

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-likelihood of each text, in windows of the model's length; the first follows the
        end-of-text token.
        """
        windows = [self._windows(*request.args) for request in requests]
        flat = [window for of_text in windows for window in of_text]
        scores = iter(self._scorer(flat, self._progress and not disable_tqdm))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text):
        """`(context, continuation)` tokens that cover a text once."""
        rolling = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in rolling]

    def generate_until(self, requests, disable_tqdm=False):
        """The continuation of each context up to one of its `until` strings, which is not part of
        it.

        Contexts lose their first tokens where else there were no room for the continuation. Draws
        are the same at every run; `do_sample` has to be asked for.

        Raises:
          UserError: a task asks for more tokens than the model takes, or for settings that aren't
            known here.
        """
        texts = [None] * len(requests)
        groups = {}  # of equal settings
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        groups = [
            (self._generation_settings(requests[numbers[0]].args[1]), numbers)
            for numbers in groups.values()
        ]
        with tqdm(
            total=len(requests), desc="generating", disable=disable_tqdm or not self._progress
        ) as bar:
            for settings, numbers in groups:
                room = self.max_length - settings["max_tokens"]
                prompts = {
                    n: (self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-room:]
                    for n in numbers
                }
                numbers = sorted(numbers, key=lambda n: len(prompts[n]))
                size = min(GENERATED_TOGETHER, 2 ** math.ceil(math.log2(len(numbers))))
                for seed, first in enumerate(range(0, len(numbers), size)):
                    batch = numbers[first : first + size]
                    generated = self._generate([prompts[n] for n in batch], size, seed, **settings)
                    for n, text in zip(batch, generated, strict=True):
                        texts[n] = text
                    bar.update(len(batch))
        return texts

    def _generation_settings(self, given):
        """`max_tokens`, `sampling` and `until` of a request."""
        wanted = normalize_gen_kwargs(given, min(256, self.max_length // 2))
        until, max_tokens = wanted.pop("until"), wanted.pop("max_gen_toks")
        do_sample, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 0.0)
        top = {name: wanted.pop(name, None) for name in ("top_k", "top_p")}
        if wanted:
            raise UserError(
                f"the task asks to generate with {wanted}; known are until, max_gen_toks, do_sample, temperature, top_k "
                "and top_p"
            )
        if max_tokens >= self.max_length:
            raise UserError(
                f"the task asks for {max_tokens} tokens; model.max_len={self.max_length} must be larger than that"
            )
        sampling = Sampling(temperature, **top) if do_sample and temperature else Sampling(0.0)
        return {
            "max_tokens": max_tokens,
            "sampling": sampling,
            "until": [text for text in until if text],
        }

    def _generate(self, prompts, size, seed, max_tokens, sampling, until):
        """The texts after prompts, of which there are `size` at most, so that few shapes are
        compiled.
        """
        if self._generator is None:
            self._generator = Generator(self._model)
        rows = prompts + [[self.prefix_token_id]] * (size - len(prompts))
        limits = [max_tokens] * len(prompts) + [0] * (size - len(prompts))

        longest = max(
            (len(end.encode()) for end in until), default=0
        )  # in tokens too, which are a byte at least

        def is_done(_, tokens):
            text = self._tokenizer.decode(tokens[-_CHUNK - longest :])
            return any(end in text for end in until)

        generated = self._generator.generate(
            rows, limits, sampling=sampling, seed=seed, chunk=_CHUNK, is_done=is_done
        )
        texts = [self._tokenizer.decode(tokens) for tokens in generated[: len(prompts)]]
        return [postprocess_generated_text(text, until, None) for text in texts]

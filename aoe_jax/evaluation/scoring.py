"""Log-likelihoods of token sequences after their contexts, batched by length, on any mesh.

B rows of a batch, S positions, C contexts of a batch, N continuations of each, P positions of
contexts.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model, multiple
from aoe_jax.model.decoder import Decoder, output_projection
from aoe_jax.model.decoding import check_decodes, decodes, extend, prefill
from aoe_jax.model.loss import target_log_probs
from aoe_jax.model.vocabulary import on_each_token
from aoe_jax.sharding import batch_sharding, put_batch, replicated

BATCH_TOKENS = 8192
SHORTEST = 16  # positions that a batch has at least
SHORTEST_SHARED = 32  # tokens of a context that is read once for several continuations


class Scorer:
    """Scores continuations of contexts; keeps the compiled programs, one for each shape."""

    def __init__(self, model: Model, batch_tokens=BATCH_TOKENS):
        """Takes a model and about how many tokens a batch has; raises as `check_decodes`."""
        check_decodes(model.decoder, by_token=False)
        self._shares_contexts = decodes(model.decoder)
        self._model, self._batch_tokens = model, batch_tokens
        # A text's length needn't be such that every device has the same share of its tokens.
        balance = dataclasses.replace(model.decoder.balance, aux_tokens=1.0)
        decoder = model.decoder.clone(balance=balance)
        compiled = partial(jax.jit, out_shardings=replicated(model.mesh))
        self._score_texts = compiled(partial(score_texts, decoder))
        self._score_choices = compiled(partial(score_choices, decoder))

    def __call__(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], progress=True):
        """Scores continuations.

        A long context of several requests is read once, if the model can be decoded by token.

        Args:
          requests: `(context, continuation)`, token ids; a context has at least one. The first
            tokens of what exceeds the model's length are dropped.
          progress: whether to show a bar on stderr.

        Returns:
          `(log-likelihood in nats, whether greedy decoding would give the continuation)` of each
          request, in their order.

        Raises:
          UserError: a continuation alone exceeds the model's length, or a log-likelihood isn't
            finite.
        """
        texts = [self._cut(*request) for request in requests]
        results = [None] * len(texts)
        hidden = not progress or not texts
        with tqdm(total=len(texts), desc="scoring", unit="text", disable=hidden) as bar:
            for numbers, scores in self._scored(texts):
                for number, score in zip(numbers, scores, strict=True):
                    results[number] = score
                bar.update(len(numbers))
        return results

    @property
    def max_len(self):
        """How many tokens the model takes at once."""
        return self._model.config.model.max_len

    def _cut(self, context, continuation):
        """Cuts a text to the length of the model and a last target."""
        if not len(context):
            raise ValueError("a context has one token at least, such as the end-of-text token")
        room = self.max_len + 1 - len(continuation)
        if room < 1:
            what = f"a continuation has {len(continuation)} tokens; cut it into several"
            raise UserError(f"model.max_len={self.max_len}: {what}")
        return tuple(context[-room:]), tuple(continuation)

    def _scored(self, texts):
        """Yields the numbers of texts and their scores, batch by batch."""
        by_context = {}
        for number, (context, _) in enumerate(texts):
            by_context.setdefault(context, []).append(number)
        single = []  # numbers
        shared = {}  # (N, S): [(context, numbers)]
        for context, numbers in by_context.items():
            if self._shares_contexts and len(numbers) > 1 and len(context) > SHORTEST_SHARED:
                longest = max(len(texts[number][1]) for number in numbers)
                shape = len(numbers), self._rounded(longest)
                shared.setdefault(shape, []).append((context, numbers))
            else:
                single += numbers

        def text_length(number):
            return sum(map(len, texts[number])) - 1

        def context_length(group):
            return len(group[0]) - 1

        for numbers, length, size in self._batches(single, text_length):
            arrays = _texts_arrays([texts[number] for number in numbers], size, length)
            scores = self._run(self._score_texts, self._model.params, arrays)
            yield numbers, scores[: len(numbers)]
        for (n, end), groups in shared.items():
            for batch, length, size in self._batches(groups, context_length, n, end):
                choices = [(context, [texts[i][1] for i in numbers]) for context, numbers in batch]
                arrays = _choices_arrays(choices, size, n, length, end)
                scores = self._run(self._score_choices, self._model.by_layer, arrays)
                numbers = [number for _, numbers in batch for number in numbers]
                yield numbers, scores[: len(numbers)]

    def _batches(self, items, length, n=1, others=0):
        """Cuts items into batches, those that need most memory first.

        Each item has `length(item)` tokens to be padded and `others`, n times. There are at most
        two sizes of batches for a length.

        Yields:
          `(items, padded length, rows)`.
        """
        items = sorted(items, key=length, reverse=True)
        while items:
            padded = self._rounded(length(items[0]))
            size = max(1, self._batch_tokens // (n * (padded + others)))
            size = min(size, 2 ** math.ceil(math.log2(len(items))))  # of the last items
            size = multiple(size, self._model.batch_shards)
            yield items[:size], padded, size
            items = items[size:]

    def _rounded(self, length):
        """Rounds a length up to 16, 32, 48, 64, 96, 128, ... or the model's own."""
        power = 2 ** math.ceil(math.log2(max(length, SHORTEST)))
        padded = power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power
        return multiple(min(padded, self.max_len), self._model.mesh.shape["tensor"])

    def _run(self, program, params, arrays):
        """`(log-likelihood, greedy)` of each row."""
        model = self._model
        with jax.set_mesh(model.mesh):
            batch = put_batch(batch_sharding(model.mesh), arrays)
            log_likelihood, greedy = jax.device_get(program(params, model.routing_state, batch))
        if not np.isfinite(log_likelihood).all():
            raise UserError(
                "the model gives log-likelihoods that are not finite; its weights are damaged, or "
                f"model.dtype={model.config.model.dtype} can't hold its activations"
            )
        return list(zip(log_likelihood.tolist(), greedy.tolist(), strict=True))


def _texts_arrays(texts, size, length):
    """The batch of `score_texts` for `(context, continuation)` texts, `[size, length]`."""
    tokens = np.zeros((size, length + 1), np.int32)
    real, wanted = np.zeros((size, length), bool), np.zeros((size, length), bool)
    for i, (context, continuation) in enumerate(texts):
        first, end = len(context), len(context) + len(continuation)
        tokens[i, :end] = context + continuation
        real[i, : end - 1] = True
        wanted[i, first - 1 : end - 1] = True
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "real": real, "wanted": wanted}


def _choices_arrays(groups, n_contexts, n, length, end):
    """The batch of `score_choices` for `(context, N continuations)`, P = length, S = end."""
    contexts, known = np.zeros((n_contexts, length), np.int32), np.zeros((n_contexts, length), bool)
    known[:, 0] = True
    tokens = np.zeros((n_contexts * n, end + 1), np.int32)
    wanted = np.zeros((n_contexts * n, end), bool)
    for i, (context, continuations) in enumerate(groups):
        contexts[i, : len(context) - 1] = context[:-1]
        known[i, : len(context) - 1] = True
        for row, continuation in enumerate(continuations, i * n):
            tokens[row, : len(continuation) + 1] = (context[-1], *continuation)
            wanted[row, : len(continuation)] = True
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "wanted": wanted}
    return arrays | {"contexts": contexts, "known": known}


def score_texts(decoder: Decoder, params, routing_state, batch):
    """Scores targets of whole texts.

    Args:
      decoder: the model.
      params: of the decoder.
      routing_state: of the selection method, arrays `[L, ...]` by name; None: nothing.
      batch: `inputs` and `targets` `[B, S]` int32; `real`, false where inputs are padding, and
        `wanted`, true for targets to score, `[B, S]` bool.

    Returns:
      `(log-likelihood of the wanted targets, whether each of them is the likeliest token)`, `[B]`
      float32 and bool.
    """
    real = batch["real"].astype(jnp.float32)
    hidden, _ = decoder.apply(
        {"params": params}, batch["inputs"], None, real, routing_state, method="features"
    )
    return _sums(params, hidden, batch)


def score_choices(decoder: Decoder, params, routing_state, batch):
    """Reads contexts once, and then scores each of their continuations after them.

    Args:
      decoder: the model.
      params: of the decoder, `decoding.unstacked`.
      routing_state: of the selection method, arrays `[L, ...]` by name; None: nothing.
      batch: `contexts [C, P]` int32 without their last tokens, and `known [C, P]` bool, false for
        padding; `inputs` and `targets` `[C N, S]` int32, from the last token of a context on, and
        `wanted [C N, S]` bool.

    Returns:
      The results of `score_texts`, `[C N]`.
    """
    n_contexts, length = batch["contexts"].shape
    n_rows, end = batch["inputs"].shape
    known = batch["known"].sum(axis=1, dtype=jnp.int32)
    _, cache = prefill(decoder, params, routing_state, batch["contexts"], known, length + end)
    cache = jax.tree.map(lambda a: jnp.repeat(a, n_rows // n_contexts, axis=0), cache)
    hidden, _ = extend(decoder, params, routing_state, batch["inputs"], cache)
    return _sums(params, hidden, batch)


def _sums(params, hidden, batch):
    projection = output_projection(params)
    log_probs, is_best = on_each_token(
        target_log_probs, hidden, *projection, batch["targets"], batch["wanted"]
    )
    return log_probs.sum(axis=1), is_best.all(axis=1)

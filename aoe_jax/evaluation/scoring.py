"""Log-likelihoods of token sequences given what comes before them, batched by length, on any mesh.

B rows of a batch, S positions, C contexts of a batch, N continuations of each, P positions of
contexts.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model
from aoe_jax.experts.parallel import on_each_token
from aoe_jax.model.decoder import Decoder, output_projection
from aoe_jax.model.decoding import check_decodes, extend, goes_by_token, prefill
from aoe_jax.model.loss import target_log_probs
from aoe_jax.sharding import batch_sharding, put_batch, replicated

BATCH_TOKENS = 8192
SHORTEST = 16  # positions that a batch has at least
SHORTEST_SHARED = 32  # tokens of a context that is read once for several continuations


class Scorer:
    """Scores continuations of contexts; keeps the compiled programs, one a shape."""

    def __init__(self, model: Model, batch_tokens=BATCH_TOKENS):
        """Takes a model, and how many tokens a batch has, about; raises what `check_decodes` does."""
        check_decodes(model.decoder, by_token=False)
        self._shares_contexts = goes_by_token(model.decoder)
        self._model, self._batch_tokens = model, batch_tokens
        compiled = partial(jax.jit, out_shardings=replicated(model.mesh))
        # Lengths here needn't be such that a part of the tokens falls alike on all devices.
        decoder = model.decoder.clone(
            balance=dataclasses.replace(model.decoder.balance, aux_tokens=1.0)
        )
        self._score_texts = compiled(partial(score_texts, decoder))
        self._score_choices = compiled(partial(score_choices, decoder))

    def __call__(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], progress=True):
        """Scores continuations. Long contexts that several requests share are read once, if the
        model can go by token.

        Args:
          requests: `(context, continuation)`, token ids; a context has one at least. Of what is
            longer than the model's length, the first tokens are left out.
          progress: whether to show a bar on stderr.

        Returns:
          `(log-likelihood in nats, whether greedy decoding would give the continuation)` of each,
          in the order of requests.

        Raises:
          UserError: a continuation alone is longer than the model's length, or a log-likelihood
            isn't finite.
        """
        texts = [self._cut(*request) for request in requests]
        results = [None] * len(texts)
        with tqdm(
            total=len(texts), desc="scoring", unit="text", disable=not progress or not texts
        ) as bar:
            for numbers, scores in self._scored(texts):
                for number, score in zip(numbers, scores, strict=True):
                    results[number] = score
                bar.update(len(numbers))
        return results

    @property
    def max_len(self):
        """Tokens that the model takes at once."""
        return self._model.config.model.max_len

    def _cut(self, context, continuation):
        """Together as long as the model takes, and a last target."""
        if not len(context):
            raise ValueError("a context has one token at least, such as the end-of-text token")
        room = self.max_len + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"model.max_len={self.max_len}: a continuation has {len(continuation)} tokens; cut it into several"
            )
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
                shared.setdefault((len(numbers), self._rounded(longest)), []).append(
                    (context, numbers)
                )
            else:
                single += numbers
        params = self._model.params
        for batch, length, size in self._batches(
            single, lambda number: sum(map(len, texts[number])) - 1
        ):
            arrays = _texts_arrays([texts[number] for number in batch], size, length)
            yield (
                batch,
                itertools.islice(self._results(self._score_texts, params, arrays), len(batch)),
            )
        for (n, end), groups in shared.items():
            for batch, length, size in self._batches(
                groups, lambda group: len(group[0]) - 1, n, end
            ):
                arrays = _choices_arrays(
                    [
                        (context, [texts[number][1] for number in numbers])
                        for context, numbers in batch
                    ],
                    (size, n, length, end),
                )
                scores = self._results(self._score_choices, self._model.by_layer, arrays)
                scores = itertools.islice(scores, len(batch) * n)
                yield [number for _, numbers in batch for number in numbers], scores

    def _batches(self, items, length, n=1, others=0):
        """Yields `(items, padded length, rows)`; each item has `length(item)` tokens to be padded
        and `others`, n times.

        Those that need most memory come first. There are at most two sizes of batches for a length.
        """
        items = sorted(items, key=length, reverse=True)
        shape = self._model.mesh.shape
        while items:
            padded = self._rounded(length(items[0]))
            size = max(1, self._batch_tokens // (n * (padded + others)))
            size = min(size, 2 ** math.ceil(math.log2(len(items))))  # of the last ones
            size = _multiple(size, shape["data"] * shape["fsdp"] * shape["expert"])
            yield items[:size], padded, size
            items = items[size:]

    def _rounded(self, length):
        """The next of few: 16, 32, 48, 64, 96, 128, ...; the model's own at most, but one that the
        mesh divides.
        """
        power = 2 ** math.ceil(math.log2(max(length, SHORTEST)))
        padded = power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power
        return _multiple(min(padded, self.max_len), self._model.mesh.shape["tensor"])

    def _results(self, program, params, arrays):
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
        return zip(log_likelihood.tolist(), greedy.tolist(), strict=True)


def _multiple(number, divisor):
    return -(-number // divisor) * divisor


def _texts_arrays(texts, size, length):
    """`(context, continuation)` as `inputs`, `targets`, `real` and `wanted`, `[size, length]`,
    zeros after their end.
    """
    tokens = np.zeros((size, length + 1), np.int32)
    real, wanted = (np.zeros((size, length), bool) for _ in range(2))
    for i, (context, continuation) in enumerate(texts):
        first, end = len(context), len(context) + len(continuation)
        tokens[i, :end] = context + continuation
        real[i, : end - 1] = True
        wanted[i, first - 1 : end - 1] = True
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "real": real, "wanted": wanted}


def _choices_arrays(groups, shape):
    """`(context, continuations)` as `score_choices` takes them, of `shape (C, N, P, S)`."""
    n_contexts, n, length, end = shape
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
    return {
        "contexts": contexts,
        "known": known,
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "wanted": wanted,
    }


def score_texts(decoder: Decoder, params, routing_state, batch):
    """Reads whole texts.

    Args:
      decoder: the model; a static argument.
      params: of the decoder.
      routing_state: of the selection method, arrays `[L, ...]` by name; None: nothing.
      batch: `inputs` and `targets` `[B, S]` int32; `real`, where inputs are no padding, and
        `wanted`, which targets count, `[B, S]` bool.

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
    """Reads contexts once, and then each of their continuations after them.

    Args:
      decoder: the model; a static argument.
      params: of the decoder, `decoding.unstacked`.
      routing_state: of the selection method, arrays `[L, ...]` by name; None: nothing.
      batch: `contexts [C, P]` int32 without their last tokens, and `known [C, P]` bool, where they
        are no padding; `inputs` and `targets` `[C N, S]` int32, from the last token of a context
        on, and `wanted [C N, S]` bool.

    Returns:
      As `score_texts`, `[C N]`.
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
    scores = on_each_token(target_log_probs, hidden, *projection, batch["targets"], batch["wanted"])
    return scores[0].sum(axis=1), scores[1].all(axis=1)

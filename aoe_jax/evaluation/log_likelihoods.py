"""Computes log-likelihoods of continuations of contexts, batched by length, on any mesh.

In shapes, a batch has B rows of S positions. A batch of shared contexts has C contexts of P
positions, with N continuations of each context.
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
from aoe_jax.model.decoder import output_projection
from aoe_jax.model.decoding import check_decodes, extend, prefill
from aoe_jax.model.vocabulary import chunks, logits, on_each_token
from aoe_jax.sharding import batch_sharding, put_batch, replicated

BATCH_TOKENS = 8192  # approximate number of tokens in a batch
_CHUNK_TOKENS = 256  # smaller than in training, because often only few tokens of a text are scored
SHORTEST = 16  # minimum number of positions in a batch
SHORTEST_SHARED = 32  # tokens; a longer context is processed once for all of its continuations


class Scorer:
    """Computes log-likelihoods of continuations; keeps one compiled program for each shape."""

    def __init__(self, model: Model, batch_tokens=BATCH_TOKENS):
        """Raises `UserError` if scores of a text depend on padding, other texts or later tokens."""
        check_decodes(model.decoder, by_token=False)
        self._model, self._batch_tokens = model, batch_tokens
        causality = model.decoder.routing.causality(model.decoder.experts)
        self._shares_contexts = not causality.no_decoding
        # aux_tokens=1 allows text lengths that do not divide evenly among the devices.
        balance = dataclasses.replace(model.decoder.balance, aux_tokens=1.0)
        decoder = model.decoder.clone(balance=balance)
        compiled = partial(jax.jit, out_shardings=replicated(model.mesh))
        self._score_texts = compiled(partial(_score_texts, decoder))
        self._score_choices = compiled(partial(_score_choices, decoder))

    def __call__(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]):
        """Scores pairs of token ids `(context, continuation)`; a context has at least one token.

        The first tokens of a text that exceeds `model.max_len` are dropped. A long context that
        several requests share is processed once, if the model supports incremental decoding.

        Returns a list of pairs: log-likelihood in nats, whether the continuation is the greedy one.
        Raises `UserError` if a log-likelihood is not finite or a continuation exceeds `max_len`.
        """
        max_len, texts, results = self._model.config.model.max_len, [], {}
        for context, continuation in requests:
            if len(continuation) > max_len:
                wanted = f"a continuation has {len(continuation)} tokens; cut it into several"
                raise UserError(f"model.max_len={max_len}: {wanted}")
            kept = max_len + 1 - len(continuation)
            texts.append((tuple(context[-kept:]), tuple(continuation)))
        settings = {"unit": "text", "leave": False, "disable": jax.process_index() > 0}
        with tqdm(total=len(texts), desc="scoring", **settings) as bar:
            for numbers, scores in self._scored(texts):
                results |= zip(numbers, scores, strict=True)
                bar.update(len(numbers))
        return [results[number] for number in range(len(texts))]

    def _scored(self, texts):
        by_context = {}
        for number, (context, _) in enumerate(texts):
            by_context.setdefault(context, []).append(number)
        # (N, S) -> [(length of a context, indices of the N texts with this context)], and
        # (1, 0) -> [(length of a text, [its index])] for texts that are scored whole.
        groups = {(1, 0): []}
        for context, numbers in by_context.items():
            lengths = [len(texts[number][1]) for number in numbers]
            if self._shares_contexts and len(numbers) > 1 and len(context) > SHORTEST_SHARED:
                shape = len(numbers), self._rounded(max(lengths))
                groups.setdefault(shape, []).append((len(context) - 1, numbers))
            else:
                for number, length in zip(numbers, lengths, strict=True):
                    groups[1, 0].append((len(context) - 1 + length, [number]))
        for (n, end), of_shape in groups.items():
            program, params = self._score_texts, self._model.params
            if end:
                program, params = self._score_choices, self._model.by_layer
            for numbers, length, rows in self._batches(of_shape, n, end):
                batch = [texts[number] for number in numbers]
                arrays = _batch_arrays(batch, rows, n, length, end)
                yield numbers, self._run(program, params, arrays)[: len(numbers)]

    def _batches(self, groups, n, end):
        """Yields `(indices of texts, padded length, number of rows)`, the longest texts first."""
        groups = sorted(groups, key=lambda group: group[0], reverse=True)
        while groups:
            padded = self._rounded(groups[0][0])
            rows = max(1, self._batch_tokens // (n * (padded + end)))
            rows = min(rows, 2 ** math.ceil(math.log2(len(groups))))  # fewer rows at the end
            rows = multiple(rows, self._model.config.mesh.batch_shards)
            yield [number for _, numbers in groups[:rows] for number in numbers], padded, rows
            groups = groups[rows:]

    def _rounded(self, length):
        """Rounds up to 16, 32, 48, 64, 96, ... or `max_len`, and to multiples of `mesh.tensor`."""
        power = 2 ** math.ceil(math.log2(max(length, SHORTEST)))
        padded = power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power
        padded = min(padded, self._model.config.model.max_len)
        return multiple(padded, self._model.mesh.shape["tensor"])

    def _run(self, program, params, arrays):
        model = self._model
        with jax.set_mesh(model.mesh):
            batch = put_batch(batch_sharding(model.mesh), arrays)
            log_likelihood, greedy = jax.device_get(program(params, model.routing_state, batch))
        if not np.isfinite(log_likelihood).all():
            raise UserError(
                "the model gives log-likelihoods that are not finite; its weights are damaged, or "
                f"model.dtype={model.config.model.dtype} cannot hold its activations"
            )
        return list(zip(log_likelihood.tolist(), greedy.tolist(), strict=True))


def _texts_arrays(texts, rows, length):
    tokens = np.zeros((rows, length + 1), np.int32)
    real, wanted = np.zeros((2, rows, length), bool)
    for i, (context, continuation) in enumerate(texts):
        first, end = len(context) - 1, len(context) + len(continuation) - 1
        tokens[i, : end + 1] = context + continuation
        real[i, :end] = True
        wanted[i, first:end] = True
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "real": real, "wanted": wanted}


def _batch_arrays(texts, n_contexts, n, length, end):
    """Makes the batch of `_score_texts` if `end` is 0, else of `_score_choices`, with N = `n`."""
    if not end:
        return _texts_arrays(texts, n_contexts, length)
    contexts, known = np.zeros((n_contexts, length), np.int32), np.zeros((n_contexts, length), bool)
    known[:, 0] = True
    for i, (context, _) in enumerate(texts[::n]):
        contexts[i, : len(context) - 1] = context[:-1]
        known[i, : len(context) - 1] = True
    last = [(context[-1:], continuation) for context, continuation in texts]
    return _texts_arrays(last, n_contexts * n, end) | {"contexts": contexts, "known": known}


def _score_texts(decoder, params, routing_state, batch):
    """Computes the log-likelihood of the wanted targets of each text, `[B]` float32, and whether
    greedy decoding yields these targets, `[B]` bool.

    `batch` has `inputs` and `targets` `[B, S]` int32, `real` `[B, S]` bool, which is false for
    padding in `inputs`, and `wanted` `[B, S]` bool, which is true for targets to score.
    """
    real = batch["real"].astype(jnp.float32)
    hidden, _ = decoder.apply(
        {"params": params}, batch["inputs"], None, real, routing_state, method="features"
    )
    return _sums(params, hidden, batch)


def _score_choices(decoder, params, routing_state, batch):
    """Processes each context once, and returns what `_score_texts` returns, with shape `[C N]`.

    `batch` has `contexts [C, P]` int32 without their last tokens, `known [C, P]` bool (false for
    padding), `inputs`, `targets`, `wanted` `[C N, S]`; `inputs` begin with a context's last token.
    """
    n_contexts, length = batch["contexts"].shape
    n_rows, end = batch["inputs"].shape
    known = batch["known"].sum(axis=1, dtype=jnp.int32)
    _, cache = prefill(decoder, params, routing_state, batch["contexts"], known, length + end)
    cache = jax.tree.map(lambda a: jnp.repeat(a, n_rows // n_contexts, axis=0), cache)
    hidden, _ = extend(decoder, params, routing_state, batch["inputs"], cache)
    return _sums(params, hidden, batch)


def _sums(params, hidden, batch):
    log_probs, is_best = on_each_token(
        target_log_probs, hidden, output_projection(params), batch["targets"], batch["wanted"]
    )
    return log_probs.sum(axis=1), is_best.all(axis=1)


def target_log_probs(hidden, table, targets, wanted):
    """Computes the log-probability of each wanted target and whether it is the likeliest token.

    Only chunks that have a `wanted [T]` token compute logits. The other arguments are those of
    `vocabulary.cross_entropy`.

    Returns:
      `(log_prob, is_best)`: `[T]` float32, 0 where not wanted; and `[T]` bool, true where not
      wanted. If tokens are equally likely, the first counts as the likeliest.
    """
    cast = table.astype(hidden.dtype)
    order = jnp.argsort(~wanted)  # wanted tokens first

    def score(token, target):
        values = logits(hidden[token], cast)
        of_target = jnp.take_along_axis(values, target[:, None], axis=1)[:, 0]
        log_prob = of_target - jax.nn.logsumexp(values, axis=1)
        return log_prob.astype(jnp.float32), values.argmax(axis=1) == target

    def skip(token, target):
        return jnp.zeros(token.shape, jnp.float32), jnp.ones(token.shape, bool)

    def chunk_scores(chunk):
        token, target, is_wanted = chunk
        return jax.lax.cond(is_wanted.any(), score, skip, token, target)

    sorted_tokens = chunks(_CHUNK_TOKENS, order, targets[order], wanted[order])
    scores = [a.reshape(-1)[: wanted.shape[0]] for a in jax.lax.map(chunk_scores, sorted_tokens)]
    log_prob, is_best = (jnp.zeros_like(a).at[order].set(a, unique_indices=True) for a in scores)
    return jnp.where(wanted, log_prob, 0), is_best | ~wanted

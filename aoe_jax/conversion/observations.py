"""Runs a trained model on a corpus and collects the scores and the choices of experts.

Notation: L layers, T tokens, Z experts, d model width.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.data.pipeline import train_batches
from aoe_jax.evaluation.models import Model, corpus_of, first_batches
from aoe_jax.sharding import replicated
from aoe_jax.training.step import features
from aoe_jax.training.validation import evaluate_batches


def calibration_batches(model: Model, directory: Path, data: str | None, n_tokens: int, seed: int):
    """Returns a list of random train batches, and a list of the first validation batches.

    The train batches, and the validation batches of each corpus, have `n_tokens` tokens, rounded up
    to whole batches. `data` has the syntax of `data.name`; None means the corpora of the run.
    Raises `UserError` if a corpus cannot be opened.
    """
    corpus = corpus_of(model, directory, data)
    size, seq_len = model.batch_size, model.config.data.seq_len
    train = train_batches(corpus.train, corpus.weights, seq_len, size, seed)
    n = -(-n_tokens // (size * seq_len))
    held_out = first_batches(model, corpus.validation.values(), n_tokens)
    return list(itertools.islice(train, n)), held_out


def evaluation_on(model: Model, batches):
    """The `Evaluation` of a model on host batches."""
    step = model.eval_step(model.config.data.document_mask)
    with jax.set_mesh(model.mesh):
        return evaluate_batches(step, tqdm(batches, "validation", unit="batch"), model.put)


def observations(model: Model, batches: Iterable[dict], with_inputs=False):
    """Yields `(scores, chosen)` as host arrays for each host batch, without padding tokens.

    `scores [L, T, Z]` float32 are AoE's scores or router logits. `chosen [L, T, Z]` bool marks the
    selected experts (by scores plus any bias). `with_inputs` adds the experts' input `x [L, T, d]`.
    """

    def observe(scores, routing, weights, ctx):
        n_tokens, n = scores.shape
        chosen = jnp.zeros((n_tokens, n + 1), bool).at[routing.token, routing.expert].set(True)
        arrays = (scores, chosen[:, :n], ctx.x) if with_inputs else (scores, chosen[:, :n])
        return jax.tree.map(ctx.devices.all_tokens, arrays)

    decoder = model.decoder.clone(observe=observe)

    def observed(params, routing_state, batch):
        mask = model.config.data.document_mask
        return features(decoder, params, routing_state, batch, mask)[1].records["observed"]

    compiled = jax.jit(observed, out_shardings=replicated(model.mesh))
    for batch in tqdm(batches, "scores", unit="batch"):
        with jax.set_mesh(model.mesh):
            found = jax.device_get(compiled(model.params, model.routing_state, model.put(batch)))
        is_real = batch["segment_ids"].reshape(-1) > 0
        yield tuple(a[:, is_real] for a in found)


class Moments(NamedTuple):
    """Moments of scores over tokens, in float64."""

    tokens: int
    # [L, Z, Z], sums over tokens of products of two experts' scores; AoE's scores are centred.
    second: np.ndarray
    load: np.ndarray  # [L, Z], the share of the tokens routed to each expert


def score_moments(model: Model, batches: Iterable[dict]) -> Moments:
    """Computes the `Moments` of a model's scores; memory contains the scores of one batch only."""
    tokens, total, gram, chosen = 0, 0, 0, 0
    for scores, is_chosen in observations(model, batches):
        scores = scores.astype(np.float64)
        tokens += scores.shape[1]
        total += scores.sum(axis=1)
        gram += scores.mT @ scores
        chosen += is_chosen.sum(axis=1)
    if model.config.experts.kind == "aoe":
        gram = gram - total[:, :, None] * total[:, None, :] / tokens
    return Moments(tokens, gram, chosen / tokens)

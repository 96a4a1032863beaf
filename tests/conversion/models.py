"""Small models to prune, their tokens, and what each of their layers sees of these."""

import functools

import jax
import numpy as np

from aoe_jax.conversion import moments
from tests.evaluation.models import make_config, make_model

EXPERTS = {
    "aoe": {},
    "router": {"experts__kind": "router"},
    "capacity": {"experts__kind": "capacity", "routing__capacity_factor": 1.0},
    "router, top_p": {"experts__kind": "router", "routing__name": "top_p", "routing__p": 0.4},
}


def batches(n=3, seed=0):
    """Random tokens in host batches, some of them padding."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        tokens = rng.integers(0, 250, (8, 33), dtype=np.int32)
        segment_ids = np.ones((8, 32), np.int32)
        segment_ids[-1, 20:] = 0
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}
        found.append(batch | {"weights": segment_ids.astype(np.float32)})
    return found


@functools.cache
def model_of(kind):
    """A model of random weights, of one of `EXPERTS`."""
    return make_model(make_config(**EXPERTS[kind]))


@functools.cache
def moments_of(kind):
    """`Moments` of `model_of` over `batches()`."""
    return moments.score_moments(model_of(kind), batches())


@functools.cache
def merged_scores_of(kind):
    """`merged_scores` of the same."""
    return moments.merged_scores(model_of(kind), batches())


@functools.cache
def seen_by(kind):
    """`seen` of the same."""
    return seen(model_of(kind), batches())


def seen(model, of_batches):
    """`(x [L, T, d], chosen [L, T, Z], scores [L, T, Z])` float64, of the tokens that count."""

    def observe(ctx, chosen, scores, given):
        return ctx.x, ctx.token_weights, chosen, scores

    step = moments.observing_step(model, observe)
    found = [jax.device_get(step(batch)) for batch in of_batches]
    x, weights, chosen, scores = (
        np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True)
    )
    return tuple(a[:, weights[0] > 0].astype(np.float64) for a in (x, chosen, scores))

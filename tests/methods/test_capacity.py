"""Experts with a fixed number of places, compared with a loop over groups, ranks and tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.methods.capacity import Capacity
from aoe_jax.moe.routing import TopK
from tests.arrays import assert_close
from tests.methods.method_layers import EXPERTS, assert_agree, by_loops, make

GROUPS, TOKENS, WIDTH = 3, 16, 8
BIAS = np.array([0.0, 0.1, 0, -0.2, 0])


def placed_by_loop(ranked, top_k, capacity, real):
    """`[G, T, n]` bool, whether a token has a place of an expert: first choices of all tokens come
    before second choices.
    """
    placed = np.zeros(ranked.shape, bool)
    chosen = np.argsort(-ranked, axis=-1, kind="stable")
    for group in range(GROUPS):
        free = [capacity] * EXPERTS
        for rank in range(top_k):
            for token in np.flatnonzero(real[group]):
                expert = chosen[group, token, rank]
                placed[group, token, expert] = free[expert] > 0
                free[expert] -= placed[group, token, expert]
    return placed


@pytest.mark.parametrize(
    ("capacity_factor", "top_k", "norm_topk_prob", "padded"),
    [(1.0, 1, False, False), (1.25, 2, True, True), (2.0, 3, False, True)],
)
def test_agrees_with_a_loop(x64, capacity_factor, top_k, norm_topk_prob, padded):
    """Padding takes no place. Load and balance losses count choices before any is dropped."""
    shape, routing = (GROUPS, TOKENS, WIDTH), Capacity(capacity_factor, norm_topk_prob)
    layer, params, x = make("capacity", routing, shape, recompute=padded, top_k=top_k)
    x = x.at[..., 0].add(1.0)  # some experts are crowded
    real = np.ones((GROUPS, TOKENS))
    if padded:
        real[1, 3:7], real[2] = 0, 0
    ranked = np.asarray(x @ params["w_router"]) + BIAS
    capacity = int(np.ceil(capacity_factor * top_k * TOKENS / EXPERTS))
    placed = placed_by_loop(ranked, top_k, capacity, real)
    chosen = ranked >= np.sort(ranked, axis=-1)[..., -top_k, None]

    def formula(params, x):
        scores = x @ params["w_router"]
        kept = jnp.where(chosen, scores, -jnp.inf) if norm_topk_prob else scores
        return by_loops(params, x, jax.nn.softmax(kept) * placed)

    others = {"token_weights": jnp.asarray(real)}
    others["routing_state"] = {"selection_bias": jnp.asarray(BIAS)}
    stats = assert_agree(layer, params, x, formula, **others)
    dropped = top_k * real.sum() - placed.sum()
    assert dropped > 0 or capacity_factor == 2
    assert_allclose(stats.dropped_share, dropped / (top_k * real.sum()), atol=1e-12)
    config = dataclasses.replace(layer.experts, kind="router")
    router = layer.clone(experts=config, routing=TopK(norm_topk_prob))
    want = jax.jit(router.apply)({"params": params}, x, **others)[1]
    assert_close(stats._replace(dropped_share=None), want, 1e-12)

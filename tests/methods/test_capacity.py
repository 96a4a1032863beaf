"""Experts with a fixed number of places, compared with a plain loop over groups, ranks and tokens,
and with the router that drops nothing.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods.capacity import Capacity, assign_places, combine_tensor, dispatch_tensor
from aoe_jax.moe.balance import balance_loss
from aoe_jax.moe.routing import TopK, expert_capacity
from tests.arrays import assert_close, normal
from tests.moe.drawn import parameters_of

GROUPS, TOKENS, WIDTH, EXPERTS = 3, 16, 8, 5


def make(capacity_factor, top_k=2, norm_topk_prob=True, dtype="float64", recompute=False):
    """The layer, the router layer of the same settings, their parameters, and tokens that crowd
    some experts.
    """
    config = ExpertsConfig(kind="router", n_experts=EXPERTS, top_k=top_k, d_ffn=12)
    others = {"dtype": jnp.dtype(dtype), "remat": "experts" if recompute else "none"}
    routing = Capacity(capacity_factor, norm_topk_prob)
    layer = ExpertsLayer(dataclasses.replace(config, kind="capacity"), routing=routing, **others)
    router = ExpertsLayer(config, routing=TopK(norm_topk_prob), **others)
    x = normal(0, (GROUPS, TOKENS, WIDTH), dtype).at[..., 0].add(1.0)
    return layer, router, parameters_of(layer, x), x


def softmax(p):
    e = np.exp(p - p.max())
    return e / e.sum()


def by_loop(params, x, top_k, norm_topk_prob, capacity, real=None):
    """In NumPy: outputs, the number of dropped choices of each token, and the experts of each token
    that had a place left.
    """
    w = {name: np.asarray(a) for name, a in params.items()}
    x, y = np.asarray(x), np.zeros(x.shape)
    dropped, placed = np.zeros(x.shape[:2], int), np.zeros((*x.shape[:2], EXPERTS), bool)
    for g in range(x.shape[0]):
        room = [capacity] * EXPERTS
        scores = x[g] @ w["w_router"]
        for rank in range(top_k):
            for t in range(x.shape[1]):
                if real is not None and not real[g, t]:
                    continue
                chosen = np.argsort(-scores[t], kind="stable")[:top_k]
                of_chosen, of_all = softmax(scores[t][chosen]), softmax(scores[t])[chosen]
                weights = of_chosen if norm_topk_prob else of_all
                expert = chosen[rank]
                if room[expert] == 0:
                    dropped[g, t] += 1
                    continue
                room[expert] -= 1
                placed[g, t, expert] = True
                pre = x[g, t] @ w["w_gate"][expert]
                hidden = pre / (1 + np.exp(-pre)) * (x[g, t] @ w["w_up"][expert])
                y[g, t] += weights[rank] * (hidden @ w["w_down"][expert])
    return y, dropped, placed


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("top_k", "norm_topk_prob"), [(1, False), (2, True), (3, False)])
def test_agrees_with_a_loop(x64, capacity_factor, top_k, norm_topk_prob):
    layer, _, params, x = make(capacity_factor, top_k, norm_topk_prob)
    y, stats = jax.jit(layer.apply)({"params": params}, x)
    capacity = int(np.ceil(capacity_factor * top_k * TOKENS / EXPERTS))
    want, dropped, _ = by_loop(params, x, top_k, norm_topk_prob, capacity)
    assert_allclose(y, want, atol=1e-10)
    assert dropped.sum() > 0 or capacity_factor == 2
    assert_allclose(stats.dropped_share, dropped.mean() / top_k, atol=1e-12)


def test_load_and_balance_losses_are_of_the_choice_before_dropping(x64):
    layer, router, params, x = make(1.0)
    got, want = (jax.jit(made.apply)({"params": params}, x)[1] for made in (layer, router))
    assert got.dropped_share > 0.05 and want.dropped_share is None
    jax.tree.map(partial(assert_allclose, atol=1e-12), got._replace(dropped_share=None), want)


def test_first_choices_come_before_second_ones():
    """Two experts, two places each, four tokens: places go by rank, then by token."""
    expert = jnp.array([[[0, 1], [1, 0], [0, 1], [0, 1]]])
    weight = jnp.array([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]])
    places = assign_places(expert, weight, 2, capacity=2)
    # Expert 0 takes tokens 0 and 2, which choose it first. It drops token 3 and the second choice
    # of token 1. Expert 1 takes token 1, which chooses it first, and then the second choice of
    # token 0. It drops the second choices of tokens 2 and 3.
    assert_array_equal(places.place[0], [[0, 1], [2, 0], [1, 2], [2, 2]])
    assert_allclose(places.dropped[0], [0, 0.5, 0.5, 1])
    dispatch = dispatch_tensor(places, 2, jnp.float32)
    # Every place has exactly one token.
    assert_array_equal(dispatch.sum(axis=1), np.ones((1, 2, 2)))
    combine = combine_tensor(places, dispatch)
    assert_allclose(combine[0, 0], [[0.9, 0], [0, 0.1]])
    assert_allclose(combine[0, 1], [[0, 0], [0.8, 0]])
    assert_array_equal(combine[0, 3], np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("sizes", "factor", "want"),
    [
        ((256, 8), 2.0, 64),
        ((256, 8), 2.5, 80),
        ((10, 8), 1.0, 2),
        ((16, 4), 8.0, 16),
        ((3, 64), 0.1, 1),
    ],
)
def test_places_of_an_expert(sizes, factor, want):
    assert expert_capacity(*sizes, factor) == want


def values_and_gradients(layer, params, x):
    """Output and statistics, and gradients of a projection of the output plus balance losses."""
    cotangent = normal(9, x.shape, x.dtype)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x)
        balance = balance_loss(stats.load, stats.mean_probability) + 0.3 * stats.confidence_entropy
        return (y * cotangent).sum() + balance, (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("top_k", "norm_topk_prob"), [(1, False), (2, True)])
def test_with_places_for_all_it_is_the_router(ragged, recompute, top_k, norm_topk_prob):
    layer, router, params, x = make(
        EXPERTS / top_k, top_k, norm_topk_prob, dtype="float32", recompute=recompute
    )
    got, want = (values_and_gradients(made, params, x) for made in (layer, router))
    gradients, (y, stats) = got
    assert stats.dropped_share == 0
    got = gradients, (y, stats._replace(dropped_share=None))
    assert_close(got, want, 1e-5)


def test_gradients_where_choices_are_dropped(x64):
    """They are those of a sum over all experts, weighted by the choices that the loop placed."""
    layer, _, params, x = make(1.0)
    _, dropped, placed = by_loop(params, x, 2, True, expert_capacity(TOKENS, EXPERTS, 2.0))
    assert dropped.sum() > 0

    def masked(params, x):
        scores = x @ params["w_router"]
        chosen = scores >= jax.lax.top_k(scores, 2)[0][..., -1:]
        weights = jax.nn.softmax(jnp.where(chosen, scores, -jnp.inf)) * placed
        gate, up = (jnp.einsum("gtd,ndf->gtnf", x, params[name]) for name in ("w_gate", "w_up"))
        hidden = jax.nn.silu(gate) * up
        return jnp.einsum("gtn,gtnf,nfd->gtd", weights, hidden, params["w_down"])

    cotangent = normal(9, x.shape)

    def gradients(function):
        return jax.jit(jax.grad(lambda p, x: (function(p, x) * cotangent).sum(), (0, 1)))(params, x)

    got, want = gradients(lambda p, x: layer.apply({"params": p}, x)[0]), gradients(masked)
    assert_close(got, want, 1e-10)


def test_groups_do_not_depend_on_each_other(x64):
    layer, _, params, x = make(1.0)
    apply = jax.jit(lambda x: layer.apply({"params": params}, x)[0])
    alone = [apply(x[group]) for group in range(GROUPS)]
    assert_allclose(apply(x), alone, atol=1e-12)


def test_padding_takes_no_place(x64):
    layer, _, params, x = make(1.0)
    real = np.ones((GROUPS, TOKENS), bool)
    real[1, 3:7], real[2, :] = False, False
    y, stats = jax.jit(layer.apply)({"params": params}, x, jnp.asarray(real, float))
    want, dropped, _ = by_loop(params, x, 2, True, expert_capacity(TOKENS, EXPERTS, 2.0), real)
    assert_allclose(y, want, atol=1e-10)
    assert_allclose(stats.dropped_share, dropped.sum() / (2 * real.sum()), atol=1e-12)


def test_a_selection_bias_moves_the_choice(x64):
    layer, _, params, x = make(1.0, top_k=1)
    stats = jax.jit(layer.apply)(
        {"params": params}, x, routing_state={"selection_bias": jnp.array([0.0, 0, 0, 100, 0])}
    )[1]
    assert stats.load[3] == 1
    assert_allclose(
        stats.dropped_share, 1 - expert_capacity(TOKENS, EXPERTS, 1.0) / TOKENS, atol=1e-12
    )


def test_bfloat16():
    """Dispatch and combine tensors have the dtype of computation; places do not depend on it."""
    layer, _, params, x = make(1.0, dtype="bfloat16")
    y, stats = jax.jit(layer.apply)({"params": params}, x)
    to_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    exact, exact_stats = jax.jit(layer.clone(dtype=jnp.float32).apply)(
        {"params": to_float32[0]}, to_float32[1]
    )
    assert y.dtype == jnp.bfloat16 and stats.dropped_share == exact_stats.dropped_share > 0
    assert_allclose(np.asarray(y, float), exact, atol=0.05 * float(jnp.abs(exact).max()))

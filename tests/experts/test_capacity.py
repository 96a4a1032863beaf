"""Experts of limited room against a plain loop over groups, ranks and tokens, and against the
router that drops nothing.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax import CapacityLayer, RouterLayer
from aoe_jax.config import BalanceConfig, ExpertsConfig
from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.capacity import capacity_assignment, combine_tensor, dispatch_tensor
from aoe_jax.experts.selection.expert_choice import expert_capacity
from aoe_jax.sharding import MESH_AXES
from tests.experts.drawn import parameters_of

GROUPS, TOKENS, WIDTH, EXPERTS = 3, 16, 8, 5


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make(capacity_factor, top_k=2, gate="chosen", dtype="float64", recompute=False, balance=None):
    """The layer, the router layer of the same settings, their parameters, and tokens that crowd
    some experts.
    """
    router = ExpertsConfig(kind="router", n_experts=EXPERTS, top_k=top_k, d_ffn=12, gate=gate)
    capacity = dataclasses.replace(router, kind="capacity", capacity_factor=capacity_factor)
    made = [
        Layer(config, jnp.dtype(dtype), balance or BalanceConfig(), recompute)
        for Layer, config in ((CapacityLayer, capacity), (RouterLayer, router))
    ]
    x = jax.random.normal(jax.random.key(0), (GROUPS, TOKENS, WIDTH), dtype).at[..., 0].add(1.0)
    return *made, parameters_of(made[1], x), x


def softmax(p):
    e = np.exp(p - p.max())
    return e / e.sum()


def by_loop(params, x, top_k, gate, capacity, real=None):
    """`(outputs, dropped choices of each token)`, and the experts of each token that had room, in
    numpy.
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
                weights = (
                    softmax(scores[t][chosen]) if gate == "chosen" else softmax(scores[t])[chosen]
                )
                expert = chosen[rank]
                if room[expert] == 0:
                    dropped[g, t] += 1
                    continue
                room[expert] -= 1
                placed[g, t, expert] = True
                pre = x[g, t] @ w["w_g"][expert]
                hidden = pre / (1 + np.exp(-pre)) * (x[g, t] @ w["w_p"][expert])
                y[g, t] += weights[rank] * (hidden @ w["w_o"][expert])
    return y, dropped, placed


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "all"), (2, "chosen"), (3, "all")])
def test_agrees_with_a_loop(x64, capacity_factor, top_k, gate):
    layer, _, params, x = make(capacity_factor, top_k, gate)
    y, stats = jax.jit(layer.apply)({"params": params}, x)
    capacity = int(np.ceil(capacity_factor * top_k * TOKENS / EXPERTS))
    want, dropped, _ = by_loop(params, x, top_k, gate, capacity)
    np.testing.assert_allclose(y, want, atol=1e-10)
    assert dropped.sum() > 0 or capacity_factor == 2
    np.testing.assert_allclose(stats.dropped_share, dropped.mean() / top_k, atol=1e-12)


def test_load_and_balance_losses_are_of_the_choice_before_dropping(x64):
    layer, router, params, x = make(1.0)
    got, want = (jax.jit(made.apply)({"params": params}, x)[1] for made in (layer, router))
    assert got.dropped_share > 0.05 and want.dropped_share is None
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-12), got._replace(dropped_share=None), want
    )


def test_first_choices_come_before_second_ones():
    """Two experts, two places each, four tokens: the order of ranks, then of tokens."""
    expert = jnp.array([[[0, 1], [1, 0], [0, 1], [0, 1]]])
    weight = jnp.array([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]])
    places = capacity_assignment(expert, weight, 2, capacity=2)
    # Expert 0: tokens 0 and 2, by first choice; token 3 comes too late, and so does the second
    # choice of token 1. Expert 1: token 1 by first choice, then the second choice of token 0; those
    # of 2 and 3 come too late.
    np.testing.assert_array_equal(places.place[0], [[0, 1], [2, 0], [1, 2], [2, 2]])
    np.testing.assert_allclose(places.dropped[0], [0, 0.5, 0.5, 1])
    dispatch = dispatch_tensor(places, 2, jnp.float32)
    np.testing.assert_array_equal(
        dispatch.sum(axis=1), np.ones((1, 2, 2))
    )  # no place has two tokens, all are taken
    combine = combine_tensor(places, dispatch)
    np.testing.assert_allclose(combine[0, 0], [[0.9, 0], [0, 0.1]])
    np.testing.assert_allclose(combine[0, 1], [[0, 0], [0.8, 0]])
    np.testing.assert_array_equal(combine[0, 3], np.zeros((2, 2)))


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
    """Output and statistics, and gradients of a projection of the output and of the balance losses."""
    cotangent = jax.random.normal(jax.random.key(9), x.shape, x.dtype)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x)
        balance = balance_loss(stats.load, stats.mean_probability) + 0.3 * stats.confidence_entropy
        return (y * cotangent).sum() + balance, (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "all"), (2, "chosen")])
def test_with_room_for_all_it_is_the_router(ragged, recompute, top_k, gate):
    layer, router, params, x = make(
        EXPERTS / top_k, top_k, gate, dtype="float32", recompute=recompute
    )
    got, want = (values_and_gradients(made, params, x) for made in (layer, router))
    gradients, (y, stats) = got
    assert stats.dropped_share == 0
    got = gradients, (y, stats._replace(dropped_share=None))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_gradients_where_choices_are_dropped(x64):
    """Those of a sum over all experts with the weights of the choices that the loop finds placed."""
    layer, _, params, x = make(1.0)
    _, dropped, placed = by_loop(params, x, 2, "chosen", expert_capacity(TOKENS, EXPERTS, 2.0))
    assert dropped.sum() > 0

    def masked(params, x):
        scores = x @ params["w_router"]
        chosen = scores >= jax.lax.top_k(scores, 2)[0][..., -1:]
        weights = jax.nn.softmax(jnp.where(chosen, scores, -jnp.inf)) * placed
        hidden = jax.nn.silu(jnp.einsum("gtd,ndf->gtnf", x, params["w_g"])) * jnp.einsum(
            "gtd,ndf->gtnf", x, params["w_p"]
        )
        return jnp.einsum("gtn,gtnf,nfd->gtd", weights, hidden, params["w_o"])

    cotangent = jax.random.normal(jax.random.key(9), x.shape)

    def gradients(function):
        return jax.jit(jax.grad(lambda p, x: (function(p, x) * cotangent).sum(), (0, 1)))(params, x)

    got, want = gradients(lambda p, x: layer.apply({"params": p}, x)[0]), gradients(masked)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, float(jnp.abs(b).max())))


def test_groups_know_nothing_of_each_other(x64):
    layer, _, params, x = make(1.0)
    apply = jax.jit(lambda x: layer.apply({"params": params}, x)[0])
    alone = [apply(x[group]) for group in range(GROUPS)]
    np.testing.assert_allclose(apply(x), alone, atol=1e-12)


def test_padding_takes_no_place(x64):
    layer, _, params, x = make(1.0)
    real = np.ones((GROUPS, TOKENS), bool)
    real[1, 3:7], real[2, :] = False, False
    y, stats = jax.jit(layer.apply)({"params": params}, x, jnp.asarray(real, float))
    want, dropped, _ = by_loop(params, x, 2, "chosen", expert_capacity(TOKENS, EXPERTS, 2.0), real)
    np.testing.assert_allclose(y, want, atol=1e-10)
    np.testing.assert_allclose(stats.dropped_share, dropped.sum() / (2 * real.sum()), atol=1e-12)


def test_a_selection_bias_moves_the_choice(x64):
    layer, _, params, x = make(1.0, top_k=1)
    stats = jax.jit(layer.apply)(
        {"params": params}, x, routing_state={"selection_bias": jnp.array([0.0, 0, 0, 100, 0])}
    )[1]
    assert stats.load[3] == 1
    np.testing.assert_allclose(
        stats.dropped_share, 1 - expert_capacity(TOKENS, EXPERTS, 1.0) / TOKENS, atol=1e-12
    )


def test_bfloat16():
    """The tensors of dispatch and combine have the dtype of computation; places don't depend on it."""
    layer, _, params, x = make(1.0, dtype="bfloat16")
    y, stats = jax.jit(layer.apply)({"params": params}, x)
    to_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    exact, exact_stats = jax.jit(layer.clone(dtype=jnp.float32).apply)(
        {"params": to_float32[0]}, to_float32[1]
    )
    assert y.dtype == jnp.bfloat16 and stats.dropped_share == exact_stats.dropped_share > 0
    np.testing.assert_allclose(np.asarray(y, float), exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_flat_tokens_of_a_mesh_are_refused():
    layer, _, params, x = make(1.0, dtype="float32")
    mesh = Mesh(np.reshape(jax.devices(), (8, 1, 1, 1)), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="tokens of sequences"):
        jax.eval_shape(partial(layer.apply, {"params": params}), x.reshape(-1, WIDTH))

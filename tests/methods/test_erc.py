"""The loss of Expert-Router Coupling: its formula by loops, where it is zero, its noise, meshes,
and that it is computed in training only.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import RouterLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods.erc import ERC, coupling_loss, loss_of_norms, noise_bounds, with_noise
from aoe_jax.moe.parallel.collectives import Devices
from aoe_jax.moe.routing import TopK
from aoe_jax.training.step import init_state, training_loss
from tests.arrays import assert_close
from tests.config.refused import check_refused
from tests.methods.method_layers import small_config
from tests.moe.drawn import parameters_of

N, D, WIDTH = 6, 8, 5
KEY = jax.random.key(3)

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("x64")]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def orthonormal():
    return jnp.linalg.qr(normal(0, D, N))[0].T


@jax.jit
def loss_of(rows, w_gate, alpha, key):
    return coupling_loss(Devices(), rows.T, w_gate, alpha, key)


def by_loops(rows, w_gate, alpha, key):
    """The formula entry by entry; eps is a constant."""
    total, n = 0.0, rows.shape[0]
    constant = jax.lax.stop_gradient(rows)
    draws = jax.random.uniform(key, rows.shape, rows.dtype, -1, 1)
    norms = {}
    for i in range(n):
        apart = jnp.stack([jnp.linalg.norm(constant[i] - constant[j]) for j in range(n) if j != i])
        eps = apart.min() / (2 * jnp.linalg.norm(constant[i]))
        for j in range(n):
            c = (rows[i] * (1 + eps * draws[i])) @ w_gate[j]
            norms[i, j] = jnp.sqrt(jnp.sum(c * c))
    for i in range(n):
        for j in range(n):
            if i != j:
                total += jnp.maximum(norms[i, j] - alpha * norms[i, i], 0)
                total += jnp.maximum(norms[j, i] - alpha * norms[i, i], 0)
    return total / n**2


OF_LOOPS = jax.jit(jax.value_and_grad(by_loops, (0, 1)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_formula_and_gradients(alpha):
    rows, w_gate = normal(1, N, D), normal(2, N, D, WIDTH)
    got = jax.value_and_grad(loss_of, (0, 1))(rows, w_gate, alpha, KEY)
    want = OF_LOOPS(rows, w_gate, alpha, KEY)
    assert got[0] > 0
    assert_close(got, want, 1e-10)
    assert all(np.abs(b).max() > 0 for b in want[1])


def test_the_sum_over_pairs_is_the_mean_over_all_entries():
    norms, alpha = jnp.abs(normal(4, N, N)), 0.7
    own = alpha * np.diagonal(norms)
    entries = np.maximum(norms - own[:, None], 0) + np.maximum(norms.T - own[:, None], 0)
    np.fill_diagonal(entries, 0)
    assert_allclose(loss_of_norms(norms, alpha), entries.mean(), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_zero_where_each_row_excites_its_own_expert_alone(alpha):
    """Without noise it is zero for any orthonormal rows. With noise it is zero for rows along axes,
    which noise leaves orthogonal.
    """
    u = normal(5, WIDTH)
    rows = orthonormal()
    norms = jnp.linalg.norm(jnp.einsum("id,jdf->ijf", rows, rows[:, :, None] * u), axis=-1)
    assert_allclose(loss_of_norms(norms, alpha), 0, atol=1e-12)
    rows = jnp.eye(D)[jnp.array([3, 0, 7, 5, 1, 2])] * 1.7
    w_gate = rows[:, :, None] * u
    value, gradients = jax.value_and_grad(loss_of, (0, 1))(rows, w_gate, alpha, KEY)
    assert value == 0 and all(np.isfinite(g).all() for g in gradients)
    assert loss_of(rows[jnp.array([1, 2, 3, 4, 5, 0])], w_gate, alpha, KEY) > 0.1


def test_homogeneous_in_the_rows():
    rows, w_gate = normal(1, N, D), normal(2, N, D, WIDTH)
    assert_allclose(
        loss_of(2.5 * rows, w_gate, 1.0, KEY), 2.5 * loss_of(rows, w_gate, 1.0, KEY), rtol=1e-12
    )


def test_noise():
    """eps is sqrt(2) / 2 for orthonormal rows; with every draw a row stays nearest to itself."""
    assert_allclose(noise_bounds(orthonormal()), np.full(N, np.sqrt(0.5)), rtol=1e-12)
    rows = normal(6, N, D) * jnp.arange(1.0, N + 1)[:, None]
    noisy = jax.vmap(partial(with_noise, rows))(jax.random.split(KEY, 200))
    apart = jnp.linalg.norm(noisy[:, :, None] - rows, axis=-1)
    own = jnp.diagonal(apart, axis1=1, axis2=2)
    others = jnp.where(jnp.eye(N, dtype=bool), jnp.inf, apart).min(axis=2)
    assert (own < others).all() and (own > 0).all()
    share = jnp.abs(noisy / rows - 1).max(axis=(0, 2)) / noise_bounds(rows)
    assert (share <= 1).all() and (share > 0.9).all()


def test_zeros_have_finite_gradients():
    rows, w_gate = normal(1, N, D).at[2].set(0), normal(2, N, D, WIDTH).at[4].set(0)
    value, gradients = jax.value_and_grad(loss_of, (0, 1))(rows, w_gate, 1.0, KEY)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_activations_are_not_kept():
    rows, w_gate = normal(1, N, D), normal(2, N, D, WIDTH)
    kept = jax.tree.leaves(
        jax.eval_shape(lambda *a: jax.vjp(lambda *a: loss_of(*a, 1.0, KEY), *a)[1], rows, w_gate)
    )
    assert (N, N, WIDTH) not in {a.shape for a in kept}


def make():
    config = ExpertsConfig(kind="router", n_experts=8, top_k=2, d_ffn=16)
    routing = ERC(weight=1.0, alpha=0.5)
    layer = RouterLayer(config, routing=routing, dtype=jnp.float64, training=True)
    x = normal(7, 16, 8, D)
    return layer, parameters_of(layer, x), x


def evaluate(layer, params, x):
    def loss(params, x):
        y, stats = layer.apply({"params": params}, x, rngs={"experts": KEY})
        return (y**2).sum() + stats.records["coupling_loss"], (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


def test_the_loss_depends_on_parameters_and_noise_only(ragged):
    """Weights that are not normalised give the same loss, and experts are those of plain top-k."""
    layer, params, x = make()

    @partial(jax.jit, static_argnums=0)
    def apply(layer, key):
        y, stats = layer.apply({"params": params}, x, rngs={"experts": key})
        return y, stats.records and stats.records["coupling_loss"]

    y, loss = apply(layer, KEY)
    routing = dataclasses.replace(layer.routing, norm_topk_prob=False)
    other, same_loss = apply(layer.clone(routing=routing), KEY)
    assert same_loss == loss and jnp.abs(other - y).max() > 1e-3
    again, other_loss = apply(layer, jax.random.key(4))
    assert other_loss != loss
    assert_array_equal(again, y)
    for plain in (layer.clone(training=False), layer.clone(routing=TopK())):
        used, no_loss = apply(plain, KEY)
        assert no_loss is None
        assert_array_equal(used, y)


def test_with_loss_free_balancing(ragged):
    """The selection bias changes the choice and not the loss."""
    layer, params, x = make()
    groups = {"routing": {"name": "erc"}, "balance": {"aux_weight": 0.0, "bias_rate": 0.01}}
    config = small_config(experts={"kind": "router"}, **groups)
    (bias,) = config.routing.state(config.experts, config.balance, D).values()
    assert bias.shape == (config.experts.n_experts,)

    @jax.jit
    def apply(bias):
        state, rngs = {"selection_bias": bias}, {"experts": KEY}
        return layer.apply({"params": params}, x, routing_state=state, rngs=rngs)[1]

    plain, biased = apply(jnp.zeros(8)), apply(jnp.zeros(8).at[3].set(100.0))
    assert plain.load[3] < 1 and biased.load[3] == 1
    assert biased.records["coupling_loss"] == plain.records["coupling_loss"]
    stats = jax.tree.map(lambda a: a[None], biased)
    state, changed = config.routing.update(config, {"selection_bias": jnp.zeros((1, 8))}, stats, {})
    assert state["selection_bias"][0, 3] < 0 and changed == {}


def test_it_is_added_to_the_loss_of_training(ragged):
    """The mean over layers is added; every layer draws its own noise."""
    with jax.enable_x64(False):
        config = small_config(
            experts={"kind": "router"},
            routing={"name": "erc", "weight": 0.5},
            balance={"aux_weight": 0.01},
        )
        state = jax.jit(lambda: init_state(config, 0))()
        ones = jnp.ones((4, 32), jnp.int32)
        batch = {
            "inputs": ones,
            "targets": ones,
            "segment_ids": ones,
            "weights": ones.astype(jnp.float32),
        }
        run = jax.jit(partial(training_loss, config))
        loss, metrics = run(state.params, {}, batch, KEY)
        added = 0.01 * metrics["aux_loss"] + 0.5 * metrics["coupling_loss"]
        assert_allclose(loss, metrics["nll"] + added, rtol=1e-6)
        first, second = of_layers = metrics["stats"].records["coupling_loss"]
        assert_allclose(metrics["coupling_loss"], of_layers.mean(), rtol=1e-6)
        assert first > 0 and first != second
        _, redrawn = run(state.params, {}, batch, jax.random.key(5))
        assert redrawn["coupling_loss"] != metrics["coupling_loss"]


REFUSED = """
routing.name=erc; experts.kind=aoe => couples the columns of a plain router with whole gates
routing.name=erc; experts.kind=router; experts.factorised_gate=True => couples the columns of a
routing.name=erc; experts.kind=router; experts.large_router=True => couples the columns of a plain
routing.name=erc; experts.kind=router; experts.n_experts=1; experts.top_k=1 => of several experts
routing.name=erc; experts.kind=capacity => choose one of capacity
routing.name=erc; experts.kind=dense; balance.aux_weight=0.0 => choose one of dense
routing.name=threshold; routing.weight=1.0 => routing.weight is unknown ... known are decay
routing.alpha=0.5 => routing.alpha is unknown ... known are norm_topk_prob
routing.weight=0.0; experts.kind=router; routing.name=erc => must be greater than 0
routing.alpha=-0.5; experts.kind=router; routing.name=erc => must be at least 0
balance.coupling_alpha=0.5 => balance.coupling_alpha is gone ... set config.routing.alpha, with
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    check_refused(case)


def test_defaults():
    assert dataclasses.asdict(ERC()) == {"weight": 1, "alpha": 1, "norm_topk_prob": True}

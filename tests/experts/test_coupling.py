"""The loss of Expert-Router Coupling: what it is zero for, its formula by loops, its noise, meshes,
and training alone.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax import RouterLayer
from aoe_jax.config import BalanceConfig, Config, ExpertsConfig
from aoe_jax.errors import UserError
from aoe_jax.experts.coupling import coupling_loss, loss_of_norms, noise_bounds, with_noise
from aoe_jax.experts.parallel import Devices
from aoe_jax.sharding import MESH_AXES
from aoe_jax.training.step import init_state, training_loss
from tests.experts.drawn import parameters_of
from tests.runs import tiny_config

N, D, WIDTH = 6, 8, 5
KEY = jax.random.key(3)

pytestmark = pytest.mark.smoke


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def orthonormal():
    return jnp.linalg.qr(normal(0, D, N))[0].T


@jax.jit
def loss_of(rows, w_g, alpha, key):
    return coupling_loss(Devices(), rows.T, w_g, alpha, key)


def by_loops(rows, w_g, alpha, key):
    """As the formula is written; eps a constant."""
    total, n = 0.0, rows.shape[0]
    constant = jax.lax.stop_gradient(rows)
    draws = jax.random.uniform(key, rows.shape, rows.dtype, -1, 1)
    norms = {}
    for i in range(n):
        apart = jnp.stack([jnp.linalg.norm(constant[i] - constant[j]) for j in range(n) if j != i])
        eps = apart.min() / (2 * jnp.linalg.norm(constant[i]))
        for j in range(n):
            c = (rows[i] * (1 + eps * draws[i])) @ w_g[j]
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
    rows, w_g = normal(1, N, D), normal(2, N, D, WIDTH)
    got = jax.value_and_grad(loss_of, (0, 1))(rows, w_g, alpha, KEY)
    want = OF_LOOPS(rows, w_g, alpha, KEY)
    assert got[0] > 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
        assert np.abs(b).max() > 0


def test_the_sum_over_pairs_is_the_mean_over_all_entries():
    norms, alpha = jnp.abs(normal(4, N, N)), 0.7
    own = alpha * np.diagonal(norms)
    entries = np.maximum(norms - own[:, None], 0) + np.maximum(norms.T - own[:, None], 0)
    np.fill_diagonal(entries, 0)
    np.testing.assert_allclose(loss_of_norms(norms, alpha), entries.mean(), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_zero_where_each_row_excites_its_own_expert_alone(alpha):
    """Without noise for any orthonormal rows; with it for rows along axes, which noise leaves
    orthogonal.
    """
    u = normal(5, WIDTH)
    rows = orthonormal()
    norms = jnp.linalg.norm(jnp.einsum("id,jdf->ijf", rows, rows[:, :, None] * u), axis=-1)
    np.testing.assert_allclose(loss_of_norms(norms, alpha), 0, atol=1e-12)
    rows = jnp.eye(D)[jnp.array([3, 0, 7, 5, 1, 2])] * 1.7
    w_g = rows[:, :, None] * u
    value, gradients = jax.value_and_grad(loss_of, (0, 1))(rows, w_g, alpha, KEY)
    assert value == 0 and all(np.isfinite(g).all() for g in gradients)
    assert loss_of(rows[jnp.array([1, 2, 3, 4, 5, 0])], w_g, alpha, KEY) > 0.1


def test_homogeneous_in_the_rows():
    rows, w_g = normal(1, N, D), normal(2, N, D, WIDTH)
    np.testing.assert_allclose(
        loss_of(2.5 * rows, w_g, 1.0, KEY), 2.5 * loss_of(rows, w_g, 1.0, KEY), rtol=1e-12
    )


def test_noise():
    """eps is sqrt(2) / 2 for orthonormal rows; whatever is drawn, a row stays nearest to itself."""
    np.testing.assert_allclose(noise_bounds(orthonormal()), np.full(N, np.sqrt(0.5)), rtol=1e-12)
    rows = normal(6, N, D) * jnp.arange(1.0, N + 1)[:, None]
    noisy = jax.vmap(partial(with_noise, rows))(jax.random.split(KEY, 200))
    apart = jnp.linalg.norm(noisy[:, :, None] - rows, axis=-1)
    own = jnp.diagonal(apart, axis1=1, axis2=2)
    others = jnp.where(jnp.eye(N, dtype=bool), jnp.inf, apart).min(axis=2)
    assert (own < others).all() and (own > 0).all()
    share = jnp.abs(noisy / rows - 1).max(axis=(0, 2)) / noise_bounds(rows)
    assert (share <= 1).all() and (share > 0.9).all()


def test_zeros_have_finite_gradients():
    rows, w_g = normal(1, N, D).at[2].set(0), normal(2, N, D, WIDTH).at[4].set(0)
    value, gradients = jax.value_and_grad(loss_of, (0, 1))(rows, w_g, 1.0, KEY)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_activations_are_not_kept():
    rows, w_g = normal(1, N, D), normal(2, N, D, WIDTH)
    kept = jax.tree.leaves(
        jax.eval_shape(lambda *a: jax.vjp(lambda *a: loss_of(*a, 1.0, KEY), *a)[1], rows, w_g)
    )
    assert (N, N, WIDTH) not in {a.shape for a in kept}


def make():
    config = ExpertsConfig(kind="router", n_experts=8, top_k=2, d_ffn=16)
    balance = BalanceConfig(coupling_weight=1.0, coupling_alpha=0.5)
    layer = RouterLayer(config, jnp.float64, balance, training=True)
    x = normal(7, 16, 8, D)
    return layer, parameters_of(layer, x), x


def evaluate(layer, params, x):
    def loss(params, x):
        y, stats = layer.apply({"params": params}, x, rngs={"experts": KEY})
        return (y**2).sum() + stats.coupling, (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_a_mesh_computes_what_one_device_does(ragged, shape):
    layer, params, x = make()
    want = evaluate(layer, params, x)
    mesh = Mesh(np.reshape(jax.devices(), shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        got = evaluate(layer, params, x)
    assert got[1][1].coupling > 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, float(jnp.abs(b).max())))


def test_whatever_selects_and_whatever_is_drawn(ragged):
    """The loss is one of parameters and noise; experts are chosen as without it."""
    layer, params, x = make()

    @partial(jax.jit, static_argnums=0)
    def apply(layer, key):
        return layer.apply({"params": params}, x, rngs={"experts": key})

    y, stats = apply(layer, KEY)
    by_top_p = layer.clone(config=dataclasses.replace(layer.config, selection="top_p"))
    assert apply(by_top_p, KEY)[1].coupling == stats.coupling
    again, redrawn = apply(layer, jax.random.key(4))
    assert redrawn.coupling != stats.coupling
    np.testing.assert_array_equal(again, y)
    used, plain = apply(layer.clone(training=False), KEY)
    assert plain.coupling is None
    np.testing.assert_array_equal(used, y)


def test_it_is_added_to_the_loss_of_training(ragged):
    """Its mean over layers, which have noise of their own."""
    with jax.enable_x64(False):
        config = tiny_config(
            experts__kind="router", balance__aux_weight=0.01, balance__coupling_weight=0.5
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
        np.testing.assert_allclose(loss, metrics["nll"] + added, rtol=1e-6)
        np.testing.assert_allclose(
            metrics["coupling_loss"], metrics["stats"].coupling.mean(), rtol=1e-6
        )
        first, second = metrics["stats"].coupling
        assert first > 0 and first != second
        assert (
            run(state.params, {}, batch, jax.random.key(5))[1]["coupling_loss"]
            != metrics["coupling_loss"]
        )


@pytest.mark.parametrize(
    "experts",
    [
        {"kind": "aoe"},
        {"kind": "capacity"},
        {"kind": "router", "factorised_gate": True},
        {"kind": "router", "large_router": True},
        {"kind": "router", "n_experts": 1, "top_k": 1},
        {"kind": "dense"},
    ],
)
def test_it_is_refused_where_there_is_nothing_to_couple(experts):
    with pytest.raises(
        UserError,
        match=r"config\.balance\.coupling_weight=1\.0: couples the rows of a plain router",
    ):
        Config.from_config_dict(
            {"experts": experts, "balance": {"coupling_weight": 1.0, "aux_weight": 0.0}}
        )


def test_it_is_refused_beside_other_selections():
    experts = {"kind": "router", "selection": "threshold"}
    with pytest.raises(
        UserError,
        match=r"coupling_weight=1\.0: isn't implemented for experts\.selection='threshold'",
    ):
        Config.from_config_dict(
            {"experts": experts, "balance": {"coupling_weight": 1.0, "aux_weight": 0.0}}
        )


def test_alpha_without_the_loss_is_refused():
    with pytest.raises(
        UserError, match=r"config\.balance\.coupling_alpha=0\.5: belongs to the loss of"
    ):
        BalanceConfig(coupling_alpha=0.5)
    assert dataclasses.asdict(BalanceConfig(coupling_weight=1.0))["coupling_alpha"] == 1

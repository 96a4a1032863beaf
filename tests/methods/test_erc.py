"""The loss of Expert-Router Coupling: its formula by loops, and its place in training."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.methods.erc import ERC, coupling_loss
from aoe_jax.moe.collectives import Devices
from aoe_jax.moe.routing import TopK
from aoe_jax.training.step import init_state, training_loss
from aoe_jax.training.step_times import random_batch
from tests.arrays import assert_close, assert_finite, normal
from tests.methods.method_layers import make, small_config

N, D, WIDTH = 6, 8, 5
KEY = jax.random.key(3)

pytestmark = pytest.mark.smoke


@jax.jit
def loss_of(rows, w_gate, alpha):
    return coupling_loss(Devices(), rows.T, w_gate, alpha, KEY)


def by_loops(rows, w_gate, alpha):
    """The formula entry by entry; eps is a constant."""
    total, n = 0.0, rows.shape[0]
    constant = jax.lax.stop_gradient(rows)
    draws = jax.random.uniform(KEY, rows.shape, rows.dtype, -1, 1)
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
def test_formula_and_gradients(x64, alpha):
    rows, w_gate = normal(1, (N, D)), normal(2, (N, D, WIDTH))
    of_loss = jax.value_and_grad(loss_of, (0, 1))
    want = OF_LOOPS(rows, w_gate, alpha)
    assert_close(of_loss(rows, w_gate, alpha), want, 1e-10)
    assert all(np.abs(a).max() > 0 for a in want[1])
    assert_finite(of_loss(rows.at[2].set(0), w_gate.at[4].set(0), alpha))


def test_activations_are_not_kept():
    rows, w_gate = normal(1, (N, D)), normal(2, (N, D, WIDTH))
    kept = jax.eval_shape(lambda *a: jax.vjp(partial(loss_of, alpha=1.0), *a)[1], rows, w_gate)
    assert (N, N, WIDTH) not in {a.shape for a in jax.tree.leaves(kept)}


def test_the_loss_depends_on_parameters_and_noise_only(x64, ragged):
    """`norm_topk_prob` and a selection bias do not change it. Experts are those of top-k."""
    layer, params, x = make("router", ERC(weight=1.0, alpha=0.5), n_experts=8)
    other = layer.clone(routing=dataclasses.replace(layer.routing, norm_topk_prob=False))

    @partial(jax.jit, static_argnums=0)
    def apply(layer, key=KEY, bias=0.0):
        state = {"selection_bias": jnp.zeros(8).at[3].set(bias)}
        y, stats = layer.apply({"params": params}, x, routing_state=state, rngs={"experts": key})
        return y, stats.load[3], stats.records and stats.records["coupling_loss"]

    y, load, loss = apply(layer)
    for layer_or_bias in ((other,), (layer, KEY, 100.0)):
        changed, _, same_loss = apply(*layer_or_bias)
        assert same_loss == loss and jnp.abs(changed - y).max() > 1e-3
    assert load < 1 and apply(layer, KEY, 100.0)[1] == 1
    again, _, other_loss = apply(layer, jax.random.key(4))
    assert other_loss != loss
    assert_array_equal(again, y)
    for plain in (layer.clone(training=False), layer.clone(routing=TopK())):
        used, _, no_loss = apply(plain)
        assert no_loss is None
        assert_array_equal(used, y)


def test_it_is_added_to_the_loss_of_training(ragged):
    """The mean over layers is added; every layer draws its own noise."""
    routing, size = {"name": "erc", "weight": 0.5}, {"data": {"seq_len": 32}}
    config = small_config(experts={"kind": "router"}, routing=routing, **size)
    params, batch = jax.jit(lambda: init_state(config, 0).params)(), random_batch(config)
    loss, metrics = jax.jit(partial(training_loss, config))(params, {}, batch, KEY)
    added = 0.01 * metrics["aux_loss"] + 0.5 * metrics["coupling_loss"]
    assert_allclose(loss, metrics["nll"] + added, rtol=1e-6)
    first, second = of_layers = metrics["stats"].records["coupling_loss"]
    assert_allclose(metrics["coupling_loss"], of_layers.mean(), rtol=1e-6)
    assert first > 0 and first != second

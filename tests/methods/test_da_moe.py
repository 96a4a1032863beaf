"""Experts per token from attention: known measures and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax import AoELayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.methods.da_moe import DAMoE, best, concentration, experts_of, head_importance
from aoe_jax.model.attention.multi_head import Attention, rotary, rotary_tables
from tests.arrays import mesh_of, normal


def test_number_of_experts():
    """Uniform attention gives one expert at every position, attention to one token all of them."""
    n = jnp.arange(2, 2000)
    assert_array_equal(experts_of(concentration(1 / n, n), 4), 1)
    assert_array_equal(experts_of(concentration(jnp.ones(1998), n), 4), 4)
    assert_array_equal(concentration(jnp.ones(1), 1), 0)  # the first token sees itself only
    importance = jnp.array([0.0, 0.25, 0.2501, 0.5, 0.75, 0.7501, 1])
    assert_array_equal(experts_of(importance, 4), [1, 1, 2, 2, 3, 4, 4])


def test_weights_are_the_softmax_over_the_count_best_scores():
    scores = normal(0, (40, 6))
    count = np.arange(40) % 3 + 1
    found = best(scores, count, 3)
    expert, weight = (np.asarray(a).reshape(40, 3) for a in (found.expert, found.weight))
    for row, n, experts, weights in zip(np.asarray(scores), count, expert, weight, strict=True):
        order = np.argsort(-row)[:n]
        assert_array_equal(experts, [*order, *[6] * (3 - n)])
        assert_allclose(weights[:n], np.exp(row[order]) / np.exp(row[order]).sum(), rtol=1e-5)
        assert_array_equal(weights[n:], 0)
    gradient = jax.grad(lambda s: (best(s, count, 3).weight ** 2).sum())(scores)
    assert np.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("masked", [False, True])
def test_importance_by_each_head(masked):
    """It is `(N p - 1) / (N - 1)` without a gradient, also on a mesh that splits heads."""
    config = ModelConfig(n_heads=4, n_kv_heads=2, d_model=16, dtype="float32")
    layer, x = Attention(config, head_importance), 3 * normal(0, (4, 16, 16))
    documents = jnp.arange(16)[None].repeat(4, 0) // 5 if masked else None
    params = layer.init(jax.random.key(1), x)
    y, found, _ = jax.jit(layer.apply)(params, x, documents)
    assert found.shape == (4, 16, 4) and found.dtype == jnp.float32
    w = params["params"]
    q, k = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in "qk")
    tables = rotary_tables(16, config)
    q, k = rotary(q, *tables), jnp.repeat(rotary(k, *tables), 2, axis=1)
    visible = np.tril(np.ones((16, 16), bool))
    if masked:
        visible = visible & np.asarray(documents[0][:, None] == documents[0])
    scores = np.einsum("bhqi,bhki->bhqk", np.float64(q), np.float64(k)) / 2
    p, n = jax.nn.softmax(np.where(visible, scores, -np.inf)), visible.sum(axis=-1)
    want = np.where(n > 1, (n * p.max(axis=-1) - 1) / np.maximum(n - 1, 1), 0).swapaxes(1, 2)
    assert_allclose(found, want, atol=1e-5)
    assert (found[:, 0] == 0).all() and 0.05 < float(found[:, 1:].mean()) < 0.95
    assert not jax.grad(lambda x: layer.apply(params, x, documents)[1].sum())(x).any()
    with jax.set_mesh(mesh_of(1, 2, 2, 2)):
        of_mesh = jax.jit(layer.apply)(params, x, documents)
    assert_allclose(of_mesh[0], y, atol=1e-5)
    assert_allclose(of_mesh[1], found, atol=1e-5)


def test_a_layer_needs_attention():
    layer = AoELayer(ExpertsConfig(n_experts=4, d_ffn=24, d_low=4), routing=DAMoE())
    with pytest.raises(ValueError, match="router 'da_moe' works only in a decoder"):
        layer.init(jax.random.key(0), jnp.zeros((3, 8)))

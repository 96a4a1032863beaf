"""Causal attention in blocks of queries, against the attention of JAX: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax.config import ModelConfig
from aoe_jax.model.attention import MAX_BLOCKS, MIN_BLOCK, Attention, causal_attention
from aoe_jax.sharding import MESH_AXES


def arrays(length, dtype):
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 3, length, 10), dtype)
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.02, (2, length)), axis=1)
    return (q, k, v), cotangent, documents


def library(q, k, v, segment_ids=None):
    mask = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True).swapaxes(1, 2)


def value_and_gradients(attention, args, cotangent, segment_ids):
    y, pull_back = jax.vjp(lambda *a: attention(*a, segment_ids), *args)
    return y, *pull_back(cotangent)


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, MIN_BLOCK, MIN_BLOCK + 1, 300, MIN_BLOCK * MAX_BLOCKS + 72])
def test_blocks_compute_what_the_library_does(length, masked):
    with jax.enable_x64(True):
        args, cotangent, documents = arrays(length, jnp.float64)
        documents = documents if masked else None
        got = value_and_gradients(causal_attention, args, cotangent, documents)
        want = value_and_gradients(library, args, cotangent, documents)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # the library's softmax is of float32


def test_bfloat16():
    args, cotangent, documents = arrays(200, jnp.bfloat16)
    got = value_and_gradients(causal_attention, args, cotangent, documents)
    exact = [a.astype(jnp.float32) for a in args]
    want = value_and_gradients(library, exact, cotangent.astype(jnp.float32), documents)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_no_probabilities_are_kept():
    """Nor any product with keys that all lie after a block: of eight blocks, 36 pairs of blocks of 64."""
    length = MIN_BLOCK * MAX_BLOCKS
    args, cotangent, _ = arrays(length, jnp.float32)
    kept = jax.eval_shape(lambda *a: jax.vjp(causal_attention, *a)[1], *args)
    assert sum(a.size for a in jax.tree.leaves(kept)) <= 4 * cotangent.size + cotangent[..., 0].size
    flops = jax.jit(causal_attention).lower(*args).compile().cost_analysis()["flops"]
    products = 2 * 2 * cotangent.size * length * 36 / 64
    assert products < flops < 1.5 * products


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1)])
def test_nor_are_they_on_a_mesh(shape):
    layer = Attention(ModelConfig(n_heads=2, d_model=16, dtype="float32"))
    x = jnp.zeros((8, 100, 16))
    params = layer.init(jax.random.key(0), x)
    mesh = Mesh(np.reshape(jax.devices(), shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        kept = jax.eval_shape(lambda p, x: jax.vjp(layer.apply, p, x)[1], params, x)
    assert not [a.shape for a in jax.tree.leaves(kept) if a.ndim == 4 and a.shape[-1] >= MIN_BLOCK]

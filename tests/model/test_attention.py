"""Causal attention in blocks of queries, against the attention of JAX: values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax.config.model import ModelConfig
from aoe_jax.model.attention import (
    MAX_BLOCKS,
    MIN_BLOCK,
    Attention,
    attend_to_cache,
    causal_attention_and_peaks,
    concentration,
    rotary,
    rotary_tables,
)
from aoe_jax.sharding import MESH_AXES


def arrays(length, dtype):
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 3, length, 10), dtype)
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.02, (2, length)), axis=1)
    return (q, k, v), cotangent, documents


def library(q, k, v, segment_ids=None):
    mask = (
        None
        if segment_ids is None
        else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    )
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True).swapaxes(1, 2)


def causal_attention(q, k, v, segment_ids=None):
    return causal_attention_and_peaks(q, k, v, segment_ids)[0]


@partial(jax.jit, static_argnums=0)
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
    """Nor any product with keys that all lie after a block: of eight blocks, 36 pairs of blocks of
    64.
    """
    length = MIN_BLOCK * MAX_BLOCKS
    args, cotangent, _ = arrays(length, jnp.float32)
    kept = jax.eval_shape(lambda *a: jax.vjp(causal_attention, *a)[1], *args)
    assert sum(a.size for a in jax.tree.leaves(kept)) <= 4 * cotangent.size + cotangent[..., 0].size
    flops = jax.jit(causal_attention).lower(*args).compile().cost_analysis()["flops"]
    products = 2 * 2 * cotangent.size * length * 36 / 64
    assert products < flops < 1.5 * products


def probabilities(q, k, documents=None):
    length = q.shape[2]
    visible = np.tril(np.ones((length, length), bool))
    if documents is not None:
        visible = visible & np.asarray(documents[:, None, :, None] == documents[:, None, None, :])
    scores = np.einsum("bhqi,bhki->bhqk", *(np.asarray(a, np.float64) for a in (q, k))) / np.sqrt(
        q.shape[3]
    )
    return np.asarray(jax.nn.softmax(np.where(visible, scores, -np.inf))), visible


@pytest.mark.parametrize("masked", [False, True])
def test_peaks_are_the_largest_probabilities(masked):
    """Of several blocks; they have no gradient, and leave that of the output as it is."""
    (q, k, v), cotangent, documents = arrays(150, jnp.float32)
    documents = documents if masked else None
    peaks = causal_attention_and_peaks(q, k, v, documents)[1]
    np.testing.assert_allclose(peaks, probabilities(q, k, documents)[0].max(axis=-1), rtol=1e-5)

    def projected(function):
        return jax.grad(lambda q: (function(q) * cotangent).sum())(q)

    def with_peaks(q):
        y, peaks = causal_attention_and_peaks(q, k, v, documents)
        return y + peaks[..., None]

    want = projected(lambda q: causal_attention(q, k, v, documents))
    np.testing.assert_array_equal(projected(with_peaks), want)


def test_peaks_of_a_cache():
    (q, k, v), _, _ = arrays(20, jnp.float32)
    places = [(0, 0), (0, 0), (0, 7), (0, 0)]
    keys, values = jnp.pad(k, places), jnp.pad(v, places)
    n_past = jnp.array([15, 15])
    y, peaks = attend_to_cache(q[:, :, 15:], keys, values, n_past)
    want = causal_attention_and_peaks(q, k, v)
    np.testing.assert_allclose(y, want[0][:, :, 15:], atol=1e-5)
    np.testing.assert_allclose(peaks, want[1][:, :, 15:], rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_how_concentrated_each_head_is(masked):
    """`(N p - 1) / (N - 1)` of the N keys of the token's document, `[B, S, H]`, on a mesh that
    splits heads too.
    """
    layer = Attention(ModelConfig(n_heads=4, d_model=16, dtype="float32"), watched=True)
    x = 3 * jax.random.normal(jax.random.key(0), (4, 16, 16))
    documents = jnp.arange(16)[None].repeat(4, 0) // 5 if masked else None
    params = layer.init(jax.random.key(1), x)
    y, found = jax.jit(layer.apply)(params, x, documents)
    assert found.shape == (4, 16, 4) and found.dtype == jnp.float32
    w = params["params"]
    q, k = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in "qk")
    tables = rotary_tables(16, layer.config)
    p, visible = probabilities(rotary(q, *tables), rotary(k, *tables), documents)
    n = np.broadcast_to(visible, p.shape).sum(axis=-1)
    want = np.where(n > 1, (n * p.max(axis=-1) - 1) / np.maximum(n - 1, 1), 0).swapaxes(1, 2)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert (found[:, 0] == 0).all() and 0.05 < float(found[:, 1:].mean()) < 0.95
    mesh = Mesh(np.reshape(jax.devices(), (1, 2, 1, 4)), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        of_mesh = jax.jit(layer.apply)(params, x, documents)
    np.testing.assert_allclose(of_mesh[0], y, atol=1e-5)
    np.testing.assert_allclose(of_mesh[1], found, atol=1e-5)


def test_attention_to_all_alike_is_not_concentrated():
    n = jnp.arange(1, 100)
    np.testing.assert_allclose(concentration(1 / n, n), 0, atol=1e-6)
    np.testing.assert_array_equal(concentration(jnp.ones(99), n), np.arange(1, 100) > 1)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 8, 1, 1)])
def test_nor_are_they_on_a_mesh(shape):
    layer = Attention(ModelConfig(n_heads=2, d_model=16, dtype="float32"))
    x = jnp.zeros((8, 100, 16))
    params = layer.init(jax.random.key(0), x)
    mesh = Mesh(np.reshape(jax.devices(), shape), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        kept = jax.eval_shape(lambda p, x: jax.vjp(layer.apply, p, x)[1], params, x)
    assert not [a.shape for a in jax.tree.leaves(kept) if a.ndim == 4 and a.shape[-1] >= MIN_BLOCK]

"""Chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from aoe_jax.model import loss

pytestmark = pytest.mark.smoke


def inputs(n_tokens, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (n_tokens, 8), dtype)
    table = jax.random.normal(keys[1], (30, 8))
    targets = jax.random.randint(keys[2], (n_tokens,), 0, 30)
    weights = jax.random.uniform(keys[3], (n_tokens,)).at[0].set(0.0)
    return hidden, table, targets, weights


def plain(hidden, table, targets, weights):
    log_probability = jax.nn.log_softmax(hidden.astype(jnp.float32) @ table.T)
    return -(weights * log_probability[jnp.arange(len(targets)), targets]).sum()


@pytest.mark.parametrize("n_tokens", [1, 64, 61])
def test_values_and_gradients(n_tokens, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    args = inputs(n_tokens)

    def scaled(function):
        def value(hidden, table, scale):
            return scale * function(hidden, table, *args[2:])

        return jax.jit(jax.value_and_grad(value, (0, 1)))

    got, want = scaled(loss.cross_entropy), scaled(plain)
    for scale in (1.0, -2.5):
        results = (jax.tree.leaves(function(*args[:2], scale)) for function in (got, want))
        for a, b in zip(*results, strict=True):
            assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert_allclose(jax.jit(loss.cross_entropy)(*args), plain(*args), rtol=1e-5)


def test_bfloat16_hidden_float32_loss():
    args = inputs(64, "bfloat16")
    value, (d_hidden, d_table) = jax.jit(jax.value_and_grad(loss.cross_entropy, (0, 1)))(*args)
    assert (value.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_allclose(value, plain(*args), rtol=1e-2)
    want = jax.jit(jax.grad(plain, 1))(*args)
    assert_allclose(d_table, want, atol=0.02 * float(jnp.abs(want).max()))


def test_logits_are_never_whole():
    n_tokens, vocabulary = 4096, 8192
    shapes = (
        jnp.zeros((n_tokens, 8)),
        jnp.zeros((vocabulary, 8)),
        jnp.zeros(n_tokens, jnp.int32),
        jnp.ones(n_tokens),
    )
    compiled = jax.jit(jax.grad(loss.cross_entropy, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n_tokens * vocabulary * 4

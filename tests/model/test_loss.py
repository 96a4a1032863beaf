"""Chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(loss.cross_entropy)(*args), plain(*args), rtol=1e-5)


def test_bfloat16_hidden_float32_loss():
    args = inputs(64, "bfloat16")
    value, (d_hidden, d_table) = jax.jit(jax.value_and_grad(loss.cross_entropy, (0, 1)))(*args)
    assert (value.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, plain(*args), rtol=1e-2)
    want = jax.jit(jax.grad(plain, 1))(*args)
    np.testing.assert_allclose(d_table, want, atol=0.02 * float(jnp.abs(want).max()))


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


def two_inputs(n_tokens, dtype="float32"):
    hidden, *rest = inputs(n_tokens, dtype)
    return (hidden, hidden + jax.random.normal(jax.random.key(7), hidden.shape, dtype)), *rest


def plain_passes(consistency, hidden, table, targets, weights):
    """`(loss, nll, divergence)` by the definition, whole."""
    p, q = (jax.nn.softmax(h.astype(jnp.float32) @ table.T) for h in hidden)
    divergence = 0.5 * ((p * jnp.log(p / q)).sum(axis=1) + (q * jnp.log(q / p)).sum(axis=1))
    nll, divergence = (
        sum(plain(h, table, targets, weights) for h in hidden),
        (weights * divergence).sum(),
    )
    return nll + consistency * divergence, nll, divergence


@pytest.mark.parametrize("n_tokens", [64, 61])
def test_two_passes(n_tokens, monkeypatch):
    """Sums, and the gradient of the loss by both passes and the table."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    hidden, table, *rest = two_inputs(n_tokens)

    def scaled(function):
        def value(hidden, table, scale):
            total, *parts = function(5.0, hidden, table, *rest)
            return scale * total, parts

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    got, want = scaled(loss.consistent_cross_entropy), scaled(plain_passes)
    for scale in (1.0, -2.5):
        results = (jax.tree.leaves(function(hidden, table, scale)) for function in (got, want))
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jax.jit(loss.consistent_cross_entropy, static_argnums=0)(5.0, hidden, table, *rest),
        plain_passes(5.0, hidden, table, *rest),
        rtol=1e-5,
    )


def test_two_passes_in_bfloat16():
    hidden, table, *rest = two_inputs(64, "bfloat16")

    def value(function):
        return jax.jit(jax.value_and_grad(lambda h, t: function(5.0, h, t, *rest)[0], (0, 1)))(
            hidden, table
        )

    (got, (d_hidden, d_table)), (want, (_, wanted)) = (
        value(loss.consistent_cross_entropy),
        value(plain_passes),
    )
    assert (got.dtype, d_hidden[1].dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=2e-2)
    np.testing.assert_allclose(d_table, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def test_logits_of_two_passes_are_never_whole():
    n_tokens, vocabulary = 4096, 8192
    hidden = (jnp.zeros((n_tokens, 8)),) * 2
    shapes = (
        hidden,
        jnp.zeros((vocabulary, 8)),
        jnp.zeros(n_tokens, jnp.int32),
        jnp.ones(n_tokens),
    )
    gradient = jax.grad(lambda *args: loss.consistent_cross_entropy(5.0, *args)[0], (0, 1))
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * n_tokens * vocabulary * 4


def test_divergence():
    """Symmetric, never negative, the mean of both KL divergences, and 0 for equal passes, without a
    gradient then.
    """
    args = inputs(1)
    table, rest = args[1], (args[2], jnp.ones(1))

    @jax.jit
    def divergence(first, second):
        return loss.consistent_cross_entropy(5.0, (first[None], second[None]), table, *rest)[2]

    first, second = jax.random.normal(jax.random.key(1), (2, 50, 8))
    found = jax.vmap(divergence)(first, second)
    log_p, log_q = (jax.nn.log_softmax(a @ table.T) for a in (first, second))
    kl = [(jnp.exp(a) * (a - b)).sum(axis=1) for a, b in ((log_p, log_q), (log_q, log_p))]
    np.testing.assert_allclose(found, (kl[0] + kl[1]) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, jax.vmap(divergence)(second, first), rtol=1e-5)
    assert (found > 0).all() and not jax.vmap(divergence)(first, first).any()
    hidden, *others = inputs(64)
    alone = jax.jit(jax.grad(lambda h: loss.cross_entropy(h, *others)))(hidden)
    both = jax.jit(jax.grad(lambda h: loss.consistent_cross_entropy(5.0, h, *others)[0]))(
        (hidden, hidden)
    )
    for gradient in both:
        np.testing.assert_allclose(gradient, alone, rtol=1e-5, atol=1e-6)

"""Chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import pytest

from aoe_jax.model import vocabulary
from tests.arrays import assert_close

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
    return (-(weights * log_probability[jnp.arange(len(targets)), targets]).sum(),)


def check_chunks(monkeypatch, function, want, hidden, table, *others):
    """Compares the sums of two functions, and the gradients of the first sum."""
    monkeypatch.setattr(vocabulary, "CHUNK_TOKENS", 16)

    def scaled(function):
        def value(hidden, table, scale):
            total, *sums = function(hidden, table, *others)
            return scale * total, sums

        return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))

    for scale in (1.0, -2.5):
        results = [scaled(one)(hidden, table, scale) for one in (function, want)]
        shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), result) for result in results]
        assert shapes[0] == shapes[1]
        is_narrow = jax.tree.leaves(hidden)[0].dtype == jnp.bfloat16
        assert_close(*results, 0.05 if is_narrow else 1e-5)
    # Without a gradient.
    assert_close(jax.jit(function)(hidden, table, *others)[0], results[1][0][0] / scale, 0.02)


@pytest.mark.parametrize(
    ("n_tokens", "dtype"),
    [(1, "float32"), (64, "float32"), (61, "float32"), (64, "bfloat16")],
)
def test_values_and_gradients(monkeypatch, n_tokens, dtype):
    function = lambda *a: (vocabulary.cross_entropy(*a),)  # noqa: E731
    check_chunks(monkeypatch, function, plain, *inputs(n_tokens, dtype))


def test_logits_are_never_whole():
    n_tokens, n_words = 4096, 8192
    hidden, table = jnp.zeros((n_tokens, 8)), jnp.zeros((n_words, 8))
    targets, weights = jnp.zeros(n_tokens, jnp.int32), jnp.ones(n_tokens)
    gradient = jax.jit(jax.grad(vocabulary.cross_entropy, (0, 1)))
    compiled = gradient.lower(hidden, table, targets, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n_tokens * n_words * 4

"""Cross-entropy over a large vocabulary, without ever holding all logits.

N tokens, V vocabulary, d model width.
"""

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024


def _chunks(hidden, targets, weights):
    """Cuts the token axis into chunks of `CHUNK_TOKENS`, the last one filled up with tokens of weight 0."""
    n_tokens = hidden.shape[0]
    size = min(n_tokens, CHUNK_TOKENS)

    def cut(a):
        padded = jnp.pad(a, ((0, -n_tokens % size), *((0, 0) for _ in a.shape[1:])))
        return padded.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(cut, (hidden, targets, weights))


def _logits(hidden, table):
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=accumulator)


@jax.custom_vjp
def cross_entropy(hidden, table, targets, weights):
    """Sum over tokens of `weight * -log softmax(hidden table^T)[target]`, float32, in nats.

    The gradient is computed beside the loss, chunk by chunk, so that no logits are kept or computed twice.

    Args:
      hidden: `[N, d]`.
      table: `[V, d]`, float32 parameters; cast to the dtype of `hidden` for the product.
      targets: `[N]` int32.
      weights: `[N]` float32; no gradient.

    Returns:
      A scalar.
    """
    cast = table.astype(hidden.dtype)

    def chunk_loss(total, chunk):
        h, t, w = chunk
        logits = _logits(h, cast)
        nll = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0]
        return total + jnp.sum(w * nll), None

    return jax.lax.scan(chunk_loss, jnp.zeros((), jnp.float32), _chunks(hidden, targets, weights))[0]


def _forward(hidden, table, targets, weights):
    cast = table.astype(hidden.dtype)

    def chunk_gradient(carry, chunk):
        total, d_table = carry
        h, t, w = chunk
        logits = _logits(h, cast)
        log_normaliser = jax.nn.logsumexp(logits, axis=1)
        nll = log_normaliser - jnp.take_along_axis(logits, t[:, None], axis=1)[:, 0]
        one_hot = t[:, None] == jnp.arange(table.shape[0])
        d_logits = ((jnp.exp(logits - log_normaliser[:, None]) - one_hot) * w[:, None]).astype(h.dtype)
        d_hidden = d_logits @ cast
        d_table = d_table + jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=d_table.dtype)
        return (total + jnp.sum(w * nll), d_table), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(table))
    (total, d_table), d_hidden = jax.lax.scan(chunk_gradient, start, _chunks(hidden, targets, weights))
    return total, (d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], d_table)


def _backward(residuals, g):
    d_hidden, d_table = residuals
    return (g * d_hidden).astype(d_hidden.dtype), g * d_table, None, None


cross_entropy.defvjp(_forward, _backward)

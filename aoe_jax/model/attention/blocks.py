"""Attention in blocks of queries, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

MIN_BLOCK, MAX_BLOCKS = 64, 8  # least queries of a block, most blocks of a sequence
# Checkpoint name of the arrays that the backward pass needs, except q, k, v and those of cuDNN.
KEPT_ATTENTION = "attention"


def blocks_attention(q, k, v, segment_ids=None):
    """The backend "blocks" of `causal_attention`, with its arguments."""
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = (jnp.repeat(a, share, axis=1) for a in (k, v))
    return _attention(q, k, v, segment_ids)


def _blocks(length):
    """`(first, end)` of each block of queries."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scores(q, k, segment_ids, first, end):
    """Scores `[B, H, end - first, end]` of queries `first:end` and keys `:end`; -inf if masked."""
    visible = np.arange(first, end)[:, None] >= np.arange(end)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, first:end, None] == segment_ids[:, None, :end])[:, None]
    scores = product("bhqi,bhpi->bhqp", q[:, :, first:end], k[:, :, :end])
    return jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)


def product(subscripts, a, b):
    """`jnp.einsum` of two arrays, accumulated and returned in float32 or wider."""
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=accumulator)


@jax.custom_vjp
def _attention(q, k, v, segment_ids):
    """`blocks_attention` for equal numbers of query, key and value heads.

    A block skips the keys after its last query, which saves up to 44% of all products.
    Probabilities are normalised after their product with the values, because the product has fewer
    elements. The backward pass computes the probabilities again from one number that is kept for
    each query (FlashAttention, Dao et al. 2022, arXiv 2205.14135, section 3.1).
    """
    return _attention_forward(q, k, v, segment_ids)[0]


def _attention_forward(q, k, v, segment_ids):
    outputs, log_sums = [], []
    for first, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, first, end)
        largest = scores.max(axis=-1, keepdims=True)  # finite: each position attends to itself
        exponential = jnp.exp(scores - largest)
        total = exponential.sum(axis=-1, keepdims=True)
        y = product("bhqp,bhpi->bhqi", exponential.astype(v.dtype), v[:, :, :end])
        outputs.append((y / total).astype(v.dtype))
        log_sums.append(largest + jnp.log(total))
    y, log_sums = (jnp.concatenate(parts, axis=2) for parts in (outputs, log_sums))
    y, log_sums = (checkpoint_name(a, KEPT_ATTENTION) for a in (y, log_sums))
    return y, (q, k, v, segment_ids, y, log_sums)


def _attention_backward(residuals, g):
    q, k, v, segment_ids, y, log_sums = residuals
    projected = product("bhqi,bhqi->bhq", g, y)[..., None]
    d_q, d_k, d_v = [], 0.0, 0.0
    for first, end in _blocks(q.shape[2]):
        block, after = slice(first, end), [(0, 0), (0, 0), (0, 0), (0, q.shape[2] - end)]
        p = jnp.exp(_scores(q, k, segment_ids, first, end) - log_sums[:, :, block])
        d_p = product("bhqi,bhpi->bhqp", g[:, :, block], v[:, :, :end])
        d_scores = (p * (d_p - projected[:, :, block]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_q.append(product("bhqp,bhpi->bhqi", d_scores, k[:, :, :end]))
        # XLA computes these two faster on CPU if the width precedes the positions.
        d_k += jnp.pad(product("bhqp,bhqi->bhip", d_scores, q[:, :, block]), after)
        d_v += jnp.pad(product("bhqp,bhqi->bhip", p.astype(v.dtype), g[:, :, block]), after)
    d_q = jnp.concatenate(d_q, axis=2).astype(q.dtype)
    d_k, d_v = (a.swapaxes(2, 3).astype(k.dtype) for a in (d_k, d_v))
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)

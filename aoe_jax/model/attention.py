"""Causal multi-head attention with rotary positions.

B sequences, S positions, H heads, h head width, d model width, Q queries of a block, P keys up to its last.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.experts.parallel import over_mesh, token_spec, weight_specs

ROTARY_BASE = 10_000.0
MIN_BLOCK, MAX_BLOCKS = 64, 8  # of queries


def rotary(x, positions):
    """Rotates pairs of features by angles that grow with position (Su et al. 2021, arXiv 2104.09864).

    Args:
      x: `[..., S, h]`, h even; feature i is paired with feature i + h / 2.
      positions: `[S]` integers, a numpy array: sines and cosines are constants of the program, or XLA would compute them
        again for every sequence and head.

    Returns:
      The same shape and dtype; computed in float32 at least.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[:, None] * ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _blocks(length):
    """Where blocks of queries begin and end."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scores(q, k, segment_ids, first, end):
    """The products of a block of queries with the keys up to its last `[B, H, Q, P]`; -inf for those it doesn't see."""
    visible = np.arange(first, end)[:, None] >= np.arange(end)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, first:end, None] == segment_ids[:, None, :end])[:, None]
    scores = _product("bhqi,bhpi->bhqp", q[:, :, first:end], k[:, :, :end])
    return jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@jax.custom_vjp
def causal_attention(q, k, v, segment_ids=None):
    """Softmax attention of every position to itself and those before it, in blocks of queries.

    A block computes no products with the keys that all lie after it, up to 44% of them. Probabilities are normalised after
    their product with the values, where there are fewer numbers to divide. The backward pass computes them again, from one
    number a query that is kept (as in FlashAttention, Dao et al. 2022, arXiv 2205.14135, section 3.1). Reverse mode only.

    Args:
      q: `[B, H, S, h]`, and so are `k` and `v`.
      segment_ids: `[B, S]` int32 document numbers to attend within, or None.

    Returns:
      `[B, H, S, h]`, dtype of `v`; scores and sums are float32 at least.
    """
    return _attention_forward(q, k, v, segment_ids)[0]


def _attention_forward(q, k, v, segment_ids):
    outputs, log_sums = [], []
    for first, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, first, end)
        largest = scores.max(axis=-1, keepdims=True)  # each position sees itself, so none is -inf
        exponential = jnp.exp(scores - largest)
        total = exponential.sum(axis=-1, keepdims=True)
        y = _product("bhqp,bhpi->bhqi", exponential.astype(v.dtype), v[:, :, :end])
        outputs.append((y / total).astype(v.dtype))
        log_sums.append(largest + jnp.log(total))
    y = jnp.concatenate(outputs, axis=2)
    return y, (q, k, v, segment_ids, y, jnp.concatenate(log_sums, axis=2))


def _attention_backward(residuals, g):
    q, k, v, segment_ids, y, log_sums = residuals
    projected = _product("bhqi,bhqi->bhq", g, y)[..., None]
    d_q, d_k, d_v = [], 0.0, 0.0
    for first, end in _blocks(q.shape[2]):
        block, after = slice(first, end), [(0, 0), (0, 0), (0, q.shape[2] - end), (0, 0)]
        p = jnp.exp(_scores(q, k, segment_ids, first, end) - log_sums[:, :, block])
        d_p = _product("bhqi,bhpi->bhqp", g[:, :, block], v[:, :, :end])
        d_scores = (p * (d_p - projected[:, :, block]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_q.append(_product("bhqp,bhpi->bhqi", d_scores, k[:, :, :end]))
        d_k += jnp.pad(_product("bhqp,bhqi->bhpi", d_scores, q[:, :, block]), after)
        d_v += jnp.pad(_product("bhqp,bhqi->bhpi", p.astype(v.dtype), g[:, :, block]), after)
    return jnp.concatenate(d_q, axis=2).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


causal_attention.defvjp(_attention_forward, _attention_backward)


class Attention(nn.Module):
    """Multi-head causal self-attention, no biases."""

    n_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, segment_ids=None):
        """Attends to earlier positions, of the same document only where `segment_ids` says which.

        Args:
          x: `[B, S, d]`.
          segment_ids: `[B, S]` int32 document numbers, or None.

        Returns:
          `[B, S, d]`.
        """
        d = x.shape[-1]
        h = d // self.n_heads
        init = partial(nn.initializers.variance_scaling, 1.0, "fan_in", "normal")
        inward, outward = init(in_axis=0, out_axis=(1, 2)), init(in_axis=(0, 1), out_axis=2)
        weights = {name: self.param(name, inward, (d, self.n_heads, h)) for name in ("q", "k", "v")}
        weights["o"] = self.param("o", outward, (self.n_heads, h, d))
        in_specs = (token_spec(2, None), token_spec(2), weight_specs(weights))
        return over_mesh(self._attend, in_specs, token_spec(2, None))(x, segment_ids, weights)

    def _attend(self, devices, x, segment_ids, weights):
        """The heads of this device, for all positions of its sequences."""
        x = devices.gather(x.astype(self.dtype), "tensor", 1)
        positions = np.arange(x.shape[1])
        if segment_ids is not None:
            segment_ids = devices.gather(segment_ids, "tensor", 1)

        def heads(x, weights):
            w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            q, k, v = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in ("q", "k", "v"))
            y = causal_attention(rotary(q, positions), rotary(k, positions), v, segment_ids)
            return jnp.einsum("bhsi,hid->bsd", y, w["o"])

        return devices.sum_scatter(devices.without_whole_weights(heads)(x, weights), "tensor", 1)

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
      x: `[B, S, H, h]`, h even; feature i is paired with feature i + h / 2.
      positions: `[S]` integers, a numpy array: sines and cosines are constants of the program, or XLA would compute them
        again for every sequence and head.

    Returns:
      `[B, S, H, h]`, dtype of `x`, computed in float32 at least.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[:, None, None] * ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.checkpoint
def causal_attention(q, k, v, segment_ids=None):
    """Softmax attention of every position to itself and those before it, in blocks of queries.

    A block computes no products with the keys that all lie after it, up to 44% of them. Probabilities are normalised after
    their product with the values, where there are fewer numbers to divide, and are computed again in the backward pass,
    which on CPU costs no more than keeping them.

    Args:
      q: `[B, S, H, h]`, and so are `k` and `v`.
      segment_ids: `[B, S]` int32 document numbers to attend within, or None.

    Returns:
      `[B, S, H, h]`, dtype of `v`; scores and sums are float32 at least.
    """
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=accumulator)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    length = q.shape[2]
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for first in range(0, length, block):
        end = min(first + block, length)
        visible = jnp.arange(first, end)[:, None] >= jnp.arange(end)
        if segment_ids is not None:
            visible &= (segment_ids[:, first:end, None] == segment_ids[:, None, :end])[:, None]
        scores = product("bhqi,bhpi->bhqp", q[:, :, first:end], k[:, :, :end])
        # each position sees itself, so no row is without a number
        scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
        exponential = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = product("bhqp,bhpi->bhqi", exponential.astype(v.dtype), v[:, :, :end])
        outputs.append((y / exponential.sum(axis=-1, keepdims=True)).astype(v.dtype))
    return jnp.concatenate(outputs, axis=2).swapaxes(1, 2)


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
        return over_mesh(self.attend, in_specs, token_spec(2, None))(x, segment_ids, weights)

    def attend(self, devices, x, segment_ids, weights):
        """The heads of this device, for all positions of its sequences."""
        w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
        x = devices.gather(x.astype(self.dtype), "tensor", 1)
        q, k, v = (jnp.einsum("bsd,dhi->bshi", x, w[name]) for name in ("q", "k", "v"))
        positions = np.arange(x.shape[1])
        if segment_ids is not None:
            segment_ids = devices.gather(segment_ids, "tensor", 1)
        y = causal_attention(rotary(q, positions), rotary(k, positions), v, segment_ids)
        return devices.sum_scatter(jnp.einsum("bshi,hid->bsd", y, w["o"]), "tensor", 1)

"""Causal multi-head attention with rotary positions.

B sequences, S positions, H heads, h head width, d model width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ROTARY_BASE = 10_000.0


def rotary(x, positions):
    """Rotates pairs of features by angles that grow with position (Su et al. 2021, arXiv 2104.09864).

    Args:
      x: `[B, S, H, h]`, h even; feature i is paired with feature i + h / 2.
      positions: `[S]` int32.

    Returns:
      `[B, S, H, h]`, dtype of `x`, computed in float32 at least.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions[:, None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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
        d_model = x.shape[-1]
        heads = (self.n_heads, d_model // self.n_heads)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def project(name):
            return nn.DenseGeneral(heads, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)

        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k, v = rotary(project("q"), positions), rotary(project("k"), positions), project("v")
        mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
        return nn.DenseGeneral(d_model, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=init, name="o")(y)

"""Causal multi-head attention with rotary positions.

B sequences, S positions, H heads, h head width, d model width.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.experts.parallel import over_mesh, token_spec, weight_specs

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
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        mask = None
        if segment_ids is not None:
            segment_ids = devices.gather(segment_ids, "tensor", 1)
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        y = jax.nn.dot_product_attention(rotary(q, positions), rotary(k, positions), v, mask=mask, is_causal=True)
        return devices.sum_scatter(jnp.einsum("bshi,hid->bsd", y, w["o"]), "tensor", 1)

"""The layer of causal multi-head attention with rotary positions, with a cache for decoding."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.model import ModelConfig
from aoe_jax.model.attention import causal_attention
from aoe_jax.model.attention.blocks import product
from aoe_jax.moe.collectives import over_mesh, token_spec, weight_specs
from aoe_jax.parameters import ATTENTION
from aoe_jax.sharding import spec_of, target_device

_CACHE = spec_of("batch", "heads", None, None)
# The names of the norms' scales for each `ModelConfig.qk_norm`.
_QK_NORMS = {"none": [], "all": ["q_norm", "k_norm"], "head": ["q_head_norm", "k_head_norm"]}
_OUTPUT = (token_spec(2, None), token_spec(2, None))  # specs of `y` and `captured`


def rotary_tables(length, config: ModelConfig):
    """Cosines and sines of the rotary angles of positions 0, 1, ...

    `[length, m]` float64, where m is half of `ModelConfig.rope_width`. They are numpy arrays and so
    program constants; otherwise XLA would compute them again for every sequence and head.
    """
    half = config.rope_width // 2
    frequencies = config.rope_base ** (-np.arange(half) / half)
    if config.rope_factors:
        frequencies /= np.asarray(config.rope_factors)
    angle = np.arange(length)[:, None] * frequencies
    return np.cos(angle), np.sin(angle)


def rotary(x, cos, sin):
    """Rotates pairs of features by the angle of their position (Su et al. 2021, arXiv 2104.09864).

    `x [..., S, h]`, `cos` and `sin` `[..., S, m]` -> `[..., S, h]` in the dtype of `x`, computed in
    float32 or wider. Feature i < m is paired with feature i + m; features >= 2 m do not rotate.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        rotated = rotary(x[..., :width], cos, sin)
        return jnp.concatenate([rotated, x[..., width:]], axis=-1)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    if target_device().platform == "tpu":
        return rotary_by_product(x, cos, sin)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotary_by_product(x, cos, sin):
    """Computes `rotary` with a matrix that swaps the halves of a head and negates the second.

    On a TPU this is faster, because the matrix product fuses with the operations around it. Slices
    would move values between the 128 lanes, which needs HBM.
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[half + np.arange(half), np.arange(half)] = -1
    swap[np.arange(half), half + np.arange(half)] = 1
    swapped = jnp.einsum(
        "...i,ij->...j",
        x,
        jnp.asarray(swap, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=cos.dtype,
    )
    cos, sin = (jnp.concatenate([a, a], axis=-1) for a in (cos, sin))
    return (x.astype(cos.dtype) * cos + swapped * sin).astype(x.dtype)


def _visible(length, segment_ids):
    """Whether each query attends to each key: `[S, S]` or `[B, S, S]` bool."""
    is_past = jnp.tril(jnp.ones((length, length), bool))
    if segment_ids is None:
        return is_past
    return is_past & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _rms_norm(x, scale, epsilon):
    """RMSNorm of `[B, H, S, h]` over all heads if `scale` is `[H, h]`, per head if it is `[h]`."""
    axes = (1, 3) if scale.ndim == 2 else 3
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    inverse = jax.lax.rsqrt(squares.mean(axis=axes, keepdims=True) + epsilon)
    return (x * inverse).astype(x.dtype) * scale[..., None, :]


def attend_to_cache(q, keys, values, visible):
    """Softmax attention of queries to a cache: `[B, H, S, h]` in the dtype of `values`.

    `q [B, H, S, h]`; `keys`, `values` `[B, G, c, h]`, G divides H; `visible [B, S, c]` is the mask.
    """
    b, _, s, h = q.shape
    grouped = q.reshape(b, keys.shape[1], -1, s, h)
    scores = product("bgqsi,bgci->bgqsc", grouped, keys) * h**-0.5
    p = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
    y = product("bgqsc,bgci->bgqsi", p.astype(values.dtype), values)
    return y.reshape(q.shape).astype(values.dtype)


def _gathered(devices, weights, dtype):
    return {name: devices.gather_weight(ATTENTION[name], w, dtype) for name, w in weights.items()}


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions."""

    config: ModelConfig
    capture: Callable | None = None  # `Hooks.attention` of the method

    def setup(self):
        """Makes the parameters."""
        c = self.config
        sizes = {"d": c.d_model, "H": c.n_heads, "G": c.kv_heads, "h": c.head_width}
        names = ["q", "k", "v", "o"]
        if c.attention_bias or c.qkv_bias:
            names += ["q_bias", "k_bias", "v_bias"]
        if c.attention_bias:
            names.append("o_bias")
        names += _QK_NORMS[c.qk_norm]
        self.weights = {
            name: self.param(name, ATTENTION[name].init, ATTENTION[name].shape(sizes))
            for name in names
        }

    def __call__(self, x, segment_ids=None, with_cache=False):
        """Attends to all positions so far: `x [B, S, d]` -> `(y [B, S, d], captured, cache)`.

        `segment_ids [B, S]` int32 are document numbers, or None; attention stays within a document.
        `captured [B, S, H]` are the results of `capture`; None without it. The cache is
        `(keys, values)`, `[B, G, S, h]` each; None unless `with_cache`.
        """
        attend = partial(self._attend, with_cache=with_cache)
        out_specs = (*_OUTPUT, (_CACHE, _CACHE) if with_cache else None)
        return self._over_mesh(attend, out_specs, (token_spec(2),), x, segment_ids)

    def extend(self, x, cache, n_past):
        """Attends to positions of a cache and to positions of `x`, which follow those of the cache.

        `cache` is `(keys, values)`, `[B, G, c, h]` each, and `n_past [B]` int32 is the number of
        its filled positions; S more must be free. Returns `__call__`'s results; the cache has `x`.
        """
        keys, values = cache
        in_specs = (_CACHE, _CACHE, spec_of("batch"))
        out_specs = (*_OUTPUT, (_CACHE, _CACHE))
        return self._over_mesh(self._extend, out_specs, in_specs, x, keys, values, n_past)

    def _over_mesh(self, function, out_specs, in_specs, x, *args):
        weights = dict(self.weights)  # a copy, because Linen makes `self.weights` immutable
        in_specs = (token_spec(2, None), *in_specs, weight_specs(ATTENTION, weights))
        run = over_mesh(function, in_specs, out_specs, remat=self.config.remat)
        return run(x, *args, weights)

    def _queries_keys_values(self, x, w, positions):
        """q `[B, H, S, h]`, k and v `[B, G, S, h]`; `positions` are the rotary tables of `x`."""
        q, k, v = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in ("q", "k", "v"))
        if "q_bias" in w:
            q, k, v = q + w["q_bias"][:, None], k + w["k_bias"][:, None], v + w["v_bias"][:, None]
        if scales := [w[name] for name in _QK_NORMS[self.config.qk_norm]]:
            norm = partial(_rms_norm, epsilon=self.config.norm_eps)
            q, k = map(norm, (q, k), scales)
        cos, sin = positions
        return rotary(q, cos, sin), rotary(k, cos, sin), v

    def _attend(self, devices, x, segment_ids, weights, with_cache):
        # Along tensor, each device computes its own heads for all positions of its sequences.
        x = devices.gather(x.astype(self.config.dtype), "tensor", 1)
        tables = rotary_tables(x.shape[1], self.config)
        if segment_ids is not None:
            segment_ids = devices.gather(segment_ids, "tensor", 1)

        def heads(x, weights):
            w = _gathered(devices, weights, x.dtype)
            q, k, v = self._queries_keys_values(x, w, tables)
            y = causal_attention(q, k, v, segment_ids, backend=self.config.attention)
            visible = partial(_visible, x.shape[1], segment_ids)
            cache = (k, v) if with_cache else None
            return self._project(y, w), self._captured(devices, q, k, visible), cache

        y, captured, cache = devices.without_whole_weights(heads)(x, weights)
        return self._output(devices, y, weights), captured, cache

    def _extend(self, devices, x, keys, values, n_past, weights):
        x = devices.gather(x.astype(self.config.dtype), "tensor", 1)
        w = _gathered(devices, weights, x.dtype)
        position = n_past[:, None] + jnp.arange(x.shape[1])
        # The tables are computed for all positions in float64, because large angles need it.
        tables = rotary_tables(keys.shape[2], self.config)
        tables = (jnp.asarray(a, jnp.float32)[position][:, None] for a in tables)
        q, k, v = self._queries_keys_values(x, w, tables)
        new = (jnp.arange(x.shape[0])[:, None], slice(None), position)
        keys = keys.at[new].set(k.swapaxes(1, 2).astype(keys.dtype), mode="drop")
        values = values.at[new].set(v.swapaxes(1, 2).astype(values.dtype), mode="drop")
        visible = jnp.arange(keys.shape[2]) <= position[:, :, None]
        y = self._project(attend_to_cache(q, keys, values, visible), w)
        captured = self._captured(devices, q, keys, lambda: visible)
        return self._output(devices, y, weights), captured, (keys, values)

    def _captured(self, devices, q, k, visible):
        """The results of `capture` for all heads at the positions of this device, `[B, S, H]`."""
        if self.capture is None:
            return None
        return devices.exchange(self.capture(q, k, visible()), 2, 1, "tensor").swapaxes(1, 2)

    def _project(self, y, w):
        return jnp.einsum("bhsi,hid->bsd", y, w["o"])

    def _output(self, devices, y, weights):
        y = devices.sum_scatter(y, "tensor", 1)
        return y + weights["o_bias"].astype(y.dtype) if self.config.attention_bias else y

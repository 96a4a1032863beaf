"""Causal multi-head attention with rotary positions.

B sequences, S positions, H heads, G heads of keys and values, h head width, d model width, Q
queries of a block, P keys up to its last, M places of a cache.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config import ModelConfig
from aoe_jax.experts.parallel import over_mesh, token_spec, weight_specs
from aoe_jax.sharding import RULES

MIN_BLOCK, MAX_BLOCKS = 64, 8  # of queries
_CACHE = RULES.spec("batch", "heads", None, None)
_OUTPUT = (token_spec(2, None), token_spec(2, None))  # and concentration


def rotary_tables(length, config: ModelConfig):
    """Cosines and sines of the rotary angles of positions 0, 1, ..., each `[length, h / 2]`
    float64, numpy.

    They are constants of a program, or XLA would compute them again for every sequence and head.
    """
    half = config.d_model // config.n_heads // 2
    frequencies = config.rope_base ** (-np.arange(half) / half)
    if config.rope_factors:
        frequencies /= np.asarray(config.rope_factors)
    angle = np.arange(length)[:, None] * frequencies
    return np.cos(angle) * config.rope_scale, np.sin(angle) * config.rope_scale


def rotary(x, cos, sin):
    """Rotates pairs of features by angles that grow with position (Su et al. 2021, arXiv
    2104.09864).

    Args:
      x: `[..., S, h]`, h even; feature i is paired with feature i + h / 2.
      cos: `[..., S, h / 2]` and so is `sin`: `rotary_tables`, or rows of them.

    Returns:
      The shape and dtype of `x`; computed in float32 at least.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def _blocks(length):
    """Where blocks of queries begin and end."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _scores(q, k, segment_ids, first, end):
    """The products of a block of queries with the keys up to its last `[B, H, Q, P]`; -inf for
    those it doesn't see.
    """
    visible = np.arange(first, end)[:, None] >= np.arange(end)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, first:end, None] == segment_ids[:, None, :end])[:, None]
    scores = _product("bhqi,bhpi->bhqp", q[:, :, first:end], k[:, :, :end])
    return jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _product(subscripts, a, b):
    return jnp.einsum(
        subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )


@jax.custom_vjp
def causal_attention_and_peaks(q, k, v, segment_ids=None):
    """Softmax attention of every position to itself and those before it, in blocks of queries.

    A block computes no products with the keys that all lie after it, up to 44% of them.
    Probabilities are normalised after their product with the values, where there are fewer numbers
    to divide. The backward pass computes them again, from one number a query that is kept (as in
    FlashAttention, Dao et al. 2022, arXiv 2205.14135, section 3.1). Reverse mode only.

    Args:
      q: `[B, H, S, h]`, and so are `k` and `v`.
      segment_ids: `[B, S]` int32 document numbers to attend within, or None.

    Returns:
      `(y, peaks)`: `[B, H, S, h]`, dtype of `v`, where scores and sums are float32 at least; and
        the largest probability of
      each query, `[B, H, S]` float32 at least, without a gradient.
    """
    return _attention_forward(q, k, v, segment_ids)[0]


def _attention_forward(q, k, v, segment_ids):
    outputs, peaks, log_sums = [], [], []
    for first, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, first, end)
        largest = scores.max(axis=-1, keepdims=True)  # each position sees itself, so none is -inf
        exponential = jnp.exp(scores - largest)
        total = exponential.sum(axis=-1, keepdims=True)
        y = _product("bhqp,bhpi->bhqi", exponential.astype(v.dtype), v[:, :, :end])
        outputs.append((y / total).astype(v.dtype))
        peaks.append(1 / total[..., 0])  # that of the largest score
        log_sums.append(largest + jnp.log(total))
    y = jnp.concatenate(outputs, axis=2)
    return (y, jnp.concatenate(peaks, axis=2)), (
        q,
        k,
        v,
        segment_ids,
        y,
        jnp.concatenate(log_sums, axis=2),
    )


def _attention_backward(residuals, g):
    q, k, v, segment_ids, y, log_sums = residuals
    g, _ = g
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
    return (
        jnp.concatenate(d_q, axis=2).astype(q.dtype),
        d_k.astype(k.dtype),
        d_v.astype(v.dtype),
        None,
    )


causal_attention_and_peaks.defvjp(_attention_forward, _attention_backward)


def concentration(peaks, n_visible):
    """How much of its attention a query pays to one key: 0 to all of N alike, 1 to one alone; 0
    where N is 1.

    `peaks [...]`, the largest probability; `n_visible`, N, what broadcasts to it.
    """
    n = jnp.asarray(n_visible, peaks.dtype)
    return jnp.where(n > 1, jnp.clip((n * peaks - 1) / jnp.maximum(n - 1, 1), 0, 1), 0)


def _n_visible(length, segment_ids):
    """How many keys each query sees, `[S]` or `[B, 1, S]`."""
    position = np.arange(length)
    if segment_ids is None:
        return position + 1
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (position[:, None] >= position)
    return same.sum(axis=2)[:, None]


def _rms_norm(x, scale, epsilon):
    """Over all heads together: `x [B, H, S, h]`, `scale [H, h]`. In `jax.shard_map` there can be no
    module of its own.
    """
    squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    inverse = jax.lax.rsqrt(squares.mean(axis=(1, 3), keepdims=True) + epsilon)
    return (x * inverse).astype(x.dtype) * scale[:, None]


def attend_to_cache(q, keys, values, n_past):
    """Softmax attention of the newest positions of a cache to all of its positions up to their own.

    Args:
      q: `[B, H, S, h]` of positions `n_past`, `n_past + 1`, ...
      keys: `[B, G, M, h]`, and so is `values`; G divides H. Those of the positions of `q` are in
        it.
      n_past: `[B]` int32.

    Returns:
      `(y, peaks)` as of `causal_attention_and_peaks`.
    """
    b, n_heads, s, h = q.shape
    grouped = q.reshape(b, keys.shape[1], -1, s, h)
    position = n_past[:, None] + jnp.arange(s)
    is_visible = jnp.arange(keys.shape[2]) <= position[:, None, None, :, None]
    scores = _product("bgqsi,bgmi->bgqsm", grouped, keys) * h**-0.5
    p = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf))
    y = _product("bgqsm,bgmi->bgqsi", p.astype(values.dtype), values)
    return y.reshape(q.shape).astype(values.dtype), p.max(axis=-1).reshape(b, n_heads, s)


class Attention(nn.Module):
    """Multi-head causal self-attention with rotary positions."""

    config: ModelConfig
    watched: bool = False  # whether it also says how concentrated it is, see `concentration`

    def setup(self):
        """Makes the parameters."""
        c = self.config
        d, h = c.d_model, c.d_model // c.n_heads
        init = partial(nn.initializers.variance_scaling, 1.0, "fan_in", "normal")
        inward, outward = init(in_axis=0, out_axis=(1, 2)), init(in_axis=(0, 1), out_axis=2)
        heads = {"q": c.n_heads, "k": c.kv_heads, "v": c.kv_heads}
        self.weights = {name: self.param(name, inward, (d, n, h)) for name, n in heads.items()} | {
            "o": self.param("o", outward, (c.n_heads, h, d))
        }
        shapes = {f"{name}_bias": (n, h) for name, n in heads.items()} | {"o_bias": (d,)}
        zeros = nn.initializers.zeros_init()
        self.biases = (
            {name: self.param(name, zeros, shapes[name]) for name in shapes}
            if c.attention_bias
            else {}
        )
        ones = nn.initializers.ones_init()
        self.norms = {
            f"{name}_norm": self.param(f"{name}_norm", ones, (heads[name], h))
            for name in "qk"
            if c.qk_norm
        }

    def __call__(self, x, segment_ids=None):
        """Attends to earlier positions, of the same document only where `segment_ids` says which.

        Args:
          x: `[B, S, d]`.
          segment_ids: `[B, S]` int32 document numbers, or None.

        Returns:
          `(y, concentration)`: `[B, S, d]`, and `[B, S, H]` float32, None unless it is `watched`.
        """
        return self._over_mesh(self._attend, _OUTPUT, (token_spec(2),), x, segment_ids)

    def prefill(self, x):
        """As `__call__` without documents: `(y, concentration, (keys, values))`, the latter `[B, G,
        S, h]`.
        """
        return self._over_mesh(self._prefill, (*_OUTPUT, (_CACHE, _CACHE)), (), x)

    def extend(self, x, cache, n_past):
        """Attends to the positions of a cache and to earlier ones of `x`, which come after them.

        Args:
          x: `[B, S, d]`.
          cache: `(keys, values)`, `[B, G, M, h]` each.
          n_past: `[B]` int32, how many positions of the cache count; `x` goes to the places after
            them, which must be there.

        Returns:
          `(y, concentration, cache)`: as of `__call__`, and the cache with the keys and values of
            `x` in it.
        """
        in_specs = (_CACHE, _CACHE, RULES.spec("batch"))
        return self._over_mesh(
            self._extend, (*_OUTPUT, (_CACHE, _CACHE)), in_specs, x, *cache, n_past
        )

    def _over_mesh(self, function, out_specs, in_specs, x, *args):
        weights = {**self.weights, **self.biases, **self.norms}
        in_specs = (token_spec(2, None), *in_specs, weight_specs(weights))
        return over_mesh(function, in_specs, out_specs)(x, *args, weights)

    def _queries_keys_values(self, x, w, positions):
        """Of x `[B, S, d]` at the rows `positions` of the rotary tables: `[B, H, S, h]` and twice
        `[B, G, S, h]`.
        """
        q, k, v = (jnp.einsum("bsd,dhi->bhsi", x, w[name]) for name in ("q", "k", "v"))
        if self.biases:
            q, k, v = q + w["q_bias"][:, None], k + w["k_bias"][:, None], v + w["v_bias"][:, None]
        if self.norms:
            q, k = (
                _rms_norm(a, w[name], self.config.norm_eps)
                for a, name in ((q, "q_norm"), (k, "k_norm"))
            )
        cos, sin = positions
        return rotary(q, cos, sin), rotary(k, cos, sin), v

    def _attend(self, devices, x, segment_ids, weights):
        """The heads of this device, for all positions of its sequences."""
        x = devices.gather(x.astype(self.config.dtype), "tensor", 1)
        tables = rotary_tables(x.shape[1], self.config)
        if segment_ids is not None:
            segment_ids = devices.gather(segment_ids, "tensor", 1)

        def heads(x, weights):
            w = {name: devices.gather_weight(name, a, x.dtype) for name, a in weights.items()}
            q, k, v = self._queries_keys_values(x, w, tables)
            y, peaks = causal_attention_and_peaks(q, *self._for_each_query_head(k, v), segment_ids)
            return self._project(y, w), peaks if self.watched else None

        y, peaks = devices.without_whole_weights(heads)(x, weights)
        n_visible = _n_visible(x.shape[1], segment_ids) if self.watched else None
        return self._output(devices, y, weights), self._concentration(devices, peaks, n_visible)

    def _prefill(self, devices, x, weights):
        x = devices.gather(x.astype(self.config.dtype), "tensor", 1)
        w = {name: devices.gather_weight(name, a, x.dtype) for name, a in weights.items()}
        q, k, v = self._queries_keys_values(x, w, rotary_tables(x.shape[1], self.config))
        y, peaks = causal_attention_and_peaks(q, *self._for_each_query_head(k, v))
        y = self._output(devices, self._project(y, w), weights)
        return y, self._concentration(devices, peaks, _n_visible(x.shape[1], None)), (k, v)

    def _extend(self, devices, x, keys, values, n_past, weights):
        x = devices.gather(x.astype(self.config.dtype), "tensor", 1)
        w = {name: devices.gather_weight(name, a, x.dtype) for name, a in weights.items()}
        position = n_past[:, None] + jnp.arange(x.shape[1])
        # Of all places of the cache: exact sines of large angles need float64, which only numpy
        # has.
        tables = (
            jnp.asarray(a, jnp.float32)[position][:, None]
            for a in rotary_tables(keys.shape[2], self.config)
        )
        q, k, v = self._queries_keys_values(x, w, tables)
        row = jnp.arange(x.shape[0])[:, None]
        keys, values = (
            cache.at[row, :, position].set(new.swapaxes(1, 2).astype(cache.dtype), mode="drop")
            for cache, new in ((keys, k), (values, v))
        )
        y, peaks = attend_to_cache(q, keys, values, n_past)
        y = self._output(devices, self._project(y, w), weights)
        return y, self._concentration(devices, peaks, position[:, None] + 1), (keys, values)

    def _concentration(self, devices, peaks, n_visible):
        """Of all heads for the positions of this device, from those of its heads for all positions."""
        if not self.watched:
            return None
        return devices.exchange(concentration(peaks, n_visible), 2, 1, "tensor").swapaxes(1, 2)

    def _for_each_query_head(self, *keys):
        share = self.config.n_heads // self.config.kv_heads
        return [jnp.repeat(k, share, axis=1) if share > 1 else k for k in keys]

    def _project(self, y, w):
        return jnp.einsum("bhsi,hid->bsd", y, w["o"])

    def _output(self, devices, y, weights):
        y = devices.sum_scatter(y, "tensor", 1)
        return y + weights["o_bias"].astype(y.dtype) if self.biases else y

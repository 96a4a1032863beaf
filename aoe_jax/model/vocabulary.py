"""The embedding, the output projection and its cross-entropy over a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aoe_jax.moe.collectives import over_mesh, token_spec
from aoe_jax.parameters import EMBEDDING
from aoe_jax.sharding import MESH_AXES, spec_of

_TABLE = spec_of(*EMBEDDING.split)
CHUNK_TOKENS = 1024


def embed(table, tokens, dtype):
    """`table [V, d]`, `tokens [B, S]` -> `[B, S, d]` in `dtype`, sharded by `token_spec`."""

    def local(devices, table, tokens):
        return jnp.take(devices.gather_weight(EMBEDDING, table).astype(dtype), tokens, axis=0)

    return over_mesh(local, (_TABLE, token_spec(2)), token_spec(2, None))(table, tokens)


def logits(hidden, table):
    """`hidden [..., d]`, `table [V, d]` -> `[..., V]`, float32 at least."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=dtype
    )


def sum_over_tokens(function, hidden, table, targets, weights):
    """Applies `function` on each device to its tokens, and sums the results over all devices.

    Args:
      function: `(hidden [T, d], table [V, d], targets [T], weights [T]) -> []`, or a tree of `[]`.
      hidden: `[B, S, d]`, or a tuple of such arrays, which is passed to `function`.
      targets, weights: `[B, S]`.
    """
    # The sum over devices is outside of `shard_map`: inside, the derivative of a `psum` would be a
    # `psum` that can deadlock on XLA:CPU with the collectives of the layers' loop.
    values, out_spec = (targets, weights), PartitionSpec(MESH_AXES)
    sums = _over_tokens(function, hidden, table, values, out_spec, lambda a, _: a[None])
    return jax.tree.map(jnp.sum, sums)


def on_each_token(function, hidden, table, *values):
    """Applies `function`, which returns one result per token, on each device to its tokens.

    `values` and the arrays in the returned tuple are `[B, S]`. `function` is called on each device:
    `(hidden [T, d], table [V, d], *values [T]) -> arrays [T]`; `sum_over_tokens` has `hidden`.
    """
    return _over_tokens(function, hidden, table, values, token_spec(2), jnp.reshape)


def _over_tokens(function, hidden, table, values, out_spec, finish):
    def local(devices, hidden, table, *values):
        hidden = jax.tree.map(lambda h: h.reshape(-1, h.shape[-1]), hidden)
        table = devices.gather_weight(EMBEDDING, table)
        results = function(hidden, table, *(a.reshape(-1) for a in values))
        return jax.tree.map(lambda a: finish(a, values[0].shape), results)

    in_specs = (token_spec(2, None), _TABLE, *(token_spec(2) for _ in values))
    return over_mesh(local, in_specs, out_spec)(hidden, table, *values)


def chunks(size, *arrays):
    """Cuts `arrays [T, ...]` into chunks `[T / size, size, ...]`, with zeros after the end."""
    n_tokens = arrays[0].shape[0]
    size = min(n_tokens, size)

    def cut(a):
        padded = jnp.pad(a, ((0, -n_tokens % size), *((0, 0) for _ in a.shape[1:])))
        return padded.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(cut, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sums_over_chunks(of_chunk, n_sums, hidden, table, targets, weights):
    """Sums over tokens, `[n_sums]` float32; the first one is the loss, and only it has a gradient.

    The gradient is computed together with the loss, chunk by chunk, so that no logits are kept or
    computed twice. It is written by hand, because autodiff keeps more arrays and is slower. XLA
    removes the gradient from programs that use only the sums.

    `hidden` has one array `[T, d]` per forward pass, and `of_chunk` is
    `(logits of each pass, targets, weights) -> (sums, gradients of the loss by the logits)`.
    """
    return _forward(of_chunk, n_sums, hidden, table, targets, weights)[0]


def _forward(of_chunk, n_sums, hidden, table, targets, weights):
    cast = table.astype(hidden[0].dtype)

    def add(carry, chunk):
        (sums, d_table), (*h, t, w) = carry, chunk
        of_this, d_logits = of_chunk([logits(a, cast) for a in h], t, w)
        d_logits = [d.astype(cast.dtype) for d in d_logits]
        for d, a in zip(d_logits, h, strict=True):
            d_table = d_table + jnp.einsum("nv,nd->vd", d, a, preferred_element_type=d_table.dtype)
        return (sums + jnp.stack(of_this), d_table), tuple(d @ cast for d in d_logits)

    start = jnp.zeros(n_sums, jnp.float32), jnp.zeros_like(table)
    (sums, d_table), d_hidden = jax.lax.scan(
        add, start, chunks(CHUNK_TOKENS, *hidden, targets, weights)
    )
    n_tokens, width = hidden[0].shape
    return sums, (tuple(d.reshape(-1, width)[:n_tokens] for d in d_hidden), d_table)


def _backward(of_chunk, n_sums, residuals, g):
    d_hidden, d_table = residuals
    return tuple((g[0] * d).astype(d.dtype) for d in d_hidden), g[0] * d_table, None, None


sums_over_chunks.defvjp(_forward, _backward)


def cross_entropy(hidden, table, targets, weights):
    """Sum over tokens of `weight * -log softmax(hidden table^T)[target]`, `[]` float32, in nats.

    `hidden [T, d]`; `table [V, d]` float32, cast to the dtype of `hidden` for the product;
    `targets [T]` int32; `weights [T]` float32, without a gradient.
    """
    return sums_over_chunks(_of_one_pass, 1, (hidden,), table, targets, weights)[0]


def _of_one_pass(logits, targets, weights):
    (logits,) = logits
    log_normaliser = jax.nn.logsumexp(logits, axis=1)
    nll = log_normaliser - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    one_hot = targets[:, None] == jnp.arange(logits.shape[1])
    by_logits = (jnp.exp(logits - log_normaliser[:, None]) - one_hot) * weights[:, None]
    return [jnp.sum(weights * nll)], [by_logits]

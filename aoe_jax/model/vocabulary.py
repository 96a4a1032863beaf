"""The embedding and the output projection over a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aoe_jax.moe.parallel.collectives import over_mesh, token_spec
from aoe_jax.parameters import EMBEDDING
from aoe_jax.sharding import MESH_AXES, spec_of

_TABLE = spec_of(*EMBEDDING.split)


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
      function: `(hidden [T, d], table [V, d], targets [T], weights [T]) -> []`, or several scalars.
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

    `function(hidden [T, d], table [V, d], *values [T]) -> arrays [T]`; `values` are `[B, S]`, and
    the result is a tuple of arrays `[B, S]`. `sum_over_tokens` describes `hidden`.
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

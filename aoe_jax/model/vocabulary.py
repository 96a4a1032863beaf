"""The embedding and the output projection over a mesh.

N tokens of all sequences of a device; other letters: see `aoe_jax/moe/__init__.py`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aoe_jax.moe.parallel.collectives import over_mesh, token_spec, weight_specs
from aoe_jax.parameters import EMBEDDING
from aoe_jax.sharding import MESH_AXES


def embed(table, tokens, dtype):
    """`table [V, d]`, `tokens [B, S]` -> `[B, S, d]` in `dtype`, split like the layers' tokens."""

    def local(devices, table, tokens):
        return jnp.take(devices.gather_weight(EMBEDDING, table).astype(dtype), tokens, axis=0)

    in_specs = (_table_spec(table), token_spec(2))
    return over_mesh(local, in_specs, token_spec(2, None))(table, tokens)


def sum_over_tokens(function, hidden, table, bias, targets, weights):
    """A function of the output projection, summed over the tokens of all devices.

    Args:
      function: `(hidden [N, d], table [V, d], targets [N], weights [N]) -> []`, or several sums.
      hidden: `[B, S, d]`, or a tuple of such arrays, which the function then takes.
      table: `[V, d]`.
      bias: `[V]` or None. The function gets it as one more column of the table, with ones in
        `hidden`.
      targets, weights: `[B, S]`.
    """

    def local(devices, hidden, table, bias, targets, weights):
        projection = _projection(devices, hidden, table, bias)
        sums = function(*projection, targets.reshape(-1), weights.reshape(-1))
        return jax.tree.map(lambda a: a[None], sums)

    in_specs = (
        token_spec(2, None),
        _table_spec(table),
        PartitionSpec(),
        token_spec(2),
        token_spec(2),
    )
    # Summed out here: the derivative of a `psum` inside is another `psum`, of what all devices have
    # alike, which XLA:CPU can start beside the collectives of the layers' loop: a deadlock.
    run = over_mesh(local, in_specs, PartitionSpec(MESH_AXES))
    return jax.tree.map(jnp.sum, run(hidden, table, bias, targets, weights))


def on_each_token(function, hidden, table, bias, *values):
    """A function of the output projection with a result per token, on the tokens of each device.

    `function(hidden [N, d], table [V, d], *values [N]) -> arrays [N]`; `values` are `[B, S]`, and
    so are the arrays of the result, a tuple. Other arguments: see `sum_over_tokens`.
    """

    def local(devices, hidden, table, bias, *values):
        projection = _projection(devices, hidden, table, bias)
        arrays = function(*projection, *(a.reshape(-1) for a in values))
        return tuple(a.reshape(hidden.shape[:2]) for a in arrays)

    of_values = (token_spec(2) for _ in values)
    in_specs = (token_spec(2, None), _table_spec(table), PartitionSpec(), *of_values)
    return over_mesh(local, in_specs, token_spec(2))(hidden, table, bias, *values)


def _table_spec(table):
    return weight_specs({"table": EMBEDDING}, {"table": table})["table"]


def _projection(devices, hidden, table, bias):
    """`(hidden [N, d], table [V, d])` of a device, with the bias as a column."""
    hidden = jax.tree.map(lambda h: h.reshape(-1, h.shape[-1]), hidden)
    table = devices.gather_weight(EMBEDDING, table)
    if bias is None:
        return hidden, table
    with_ones = lambda h: jnp.concatenate([h, jnp.ones_like(h[:, :1])], axis=1)  # noqa: E731
    table = jnp.concatenate([table, bias[:, None].astype(table.dtype)], axis=1)
    return jax.tree.map(with_ones, hidden), table

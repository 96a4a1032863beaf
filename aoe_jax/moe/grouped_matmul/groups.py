"""Group sizes, the rows that no group reaches, and products that backends share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class WholeGroups(NamedTuple):
    """Group sizes that reach every row: backends need not look for rows past the last group."""

    sizes: jax.Array  # [E] int32, with a sum of M


def group_sizes_of(groups):
    """`[E]` int32 of `WholeGroups`, or of group sizes themselves."""
    return groups.sizes if isinstance(groups, WholeGroups) else groups


def zero_past_groups(rows, groups):
    """`rows [M, F]`, zero where no group reaches; `groups` are group sizes or `WholeGroups`."""
    if isinstance(groups, WholeGroups):
        return rows
    # A constant zero would be moved out of a scan over layers, as a whole array that each layer
    # reads.
    zero = jnp.minimum(groups[0], 0).astype(rows.dtype)
    return jnp.where((jnp.arange(rows.shape[0]) < groups.sum())[:, None], rows, zero)


def find(ends, index):
    """Which stretch, by their `ends [E]`, holds each index: `[M] -> [M]`; the last if past all."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)


def dot(a, b, contracted, batch=()):
    """`jax.lax.dot_general` over one axis of each array, accumulated in float32 at least."""
    dimensions = (contracted[:1], contracted[1:]), (batch, batch)
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator)

"""Group sizes, rows past the last group, and products that backends share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class WholeGroups(NamedTuple):
    """Group sizes whose sum is M, so that backends need no mask for rows past the last group."""

    sizes: jax.Array  # [E] int32


def group_sizes_of(groups):
    """The sizes `[E]` int32 of `groups`: `WholeGroups`, or the sizes themselves."""
    return groups.sizes if isinstance(groups, WholeGroups) else groups


def zero_past_groups(rows, groups):
    """Sets rows past the last group to zero: `[M, F]`; `groups` are sizes or `WholeGroups`."""
    if isinstance(groups, WholeGroups):
        return rows
    # JAX would move a constant zero out of a scan over layers, as an array that each layer reads.
    zero = jnp.minimum(groups[0], 0).astype(rows.dtype)
    return jnp.where((jnp.arange(rows.shape[0]) < groups.sum())[:, None], rows, zero)


def find(ends, index):
    """The number of the group that holds each `index [M]`, by the ends of groups `[E]`: `[M]`; the
    last group if the index is past all.
    """
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)


def dot(a, b, contracted, batch=()):
    """`jax.lax.dot_general` over one axis of each array, accumulated in float32 at least."""
    dimensions = (contracted[:1], contracted[1:]), (batch, batch)
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator)

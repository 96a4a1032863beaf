"""Helpers of all backends: group sizes, zeros past the last group, products, permutations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NOWHERE = jnp.iinfo(jnp.int32).max  # an index that is out of range of every array


class WholeGroups(NamedTuple):
    """Group sizes whose sum is M, so that backends need no mask for rows past the last group."""

    sizes: jax.Array  # [E] int32


class PaddedGroups(NamedTuple):
    """Group sizes whose sum may be below M. Results and gradients past the last group are
    undefined, so backends need no mask for them.
    """

    sizes: jax.Array  # [E] int32


def group_sizes_of(groups):
    """The sizes `[E]` int32 of `groups`, which may be the sizes themselves."""
    return groups.sizes if isinstance(groups, WholeGroups | PaddedGroups) else groups


def zero_results(rows, groups):
    """Sets results past the last group to zero, except for `PaddedGroups`."""
    return rows if isinstance(groups, PaddedGroups) else zero_past_groups(rows, groups)


def zero_past_groups(rows, groups):
    """Sets rows past the last group to zero: `[M, F]`."""
    if isinstance(groups, WholeGroups):
        return rows
    groups = group_sizes_of(groups)
    # No constant: JAX would move it out of the scan over layers, as an array that each layer loads.
    zero = jnp.minimum(groups[0], 0).astype(rows.dtype)
    return jnp.where((jnp.arange(rows.shape[0]) < groups.sum())[:, None], rows, zero)


def find(ends, index):
    """The group of each `index [M]`, for groups with `ends [E]`; E - 1 for indices past the end."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)


def take(values, index, fill=0):
    """`values[index]` along the first axis; `fill` for an index out of range, such as `NOWHERE`."""
    return values.at[index].get(mode="fill", fill_value=fill)


def dot(a, b, contracted, batch=()):
    """`jax.lax.dot_general` over one axis of each array, accumulated in float32 at least."""
    dimensions = (contracted[:1], contracted[1:]), (batch, batch)
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator)


# Autodiff would turn the gather into a scatter-add, which is slow on all platforms. No element is
# gathered twice, so the derivative is a gather by the inverse index.
@jax.custom_vjp
def permute(values, index, inverse):
    """`values[index]` along the first axis, `[M, ...] -> [N, ...]`; zero for an index out of range.

    `index [N]` int32 contains each number below M at most once. `inverse [M]` int32 is the index of
    each element of `values` in the result, out of range if the result lacks the element.
    """
    return take(values, index)


permute.defvjp(
    lambda values, index, inverse: (permute(values, index, inverse), (index, inverse)),
    lambda residuals, g: (permute(g, *reversed(residuals)), None, None),
)

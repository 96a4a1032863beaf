"""Plain JAX, for any platform: a loop over blocks of rows in expert order, each block one dense matmul.

A block belongs to one expert and starts at a multiple of the block size within its group, so a group of g rows takes
`ceil(g / B)` blocks, an empty group none. Rows of a block that lie past the end of its group are computed and dropped.
The trip count is dynamic: unused rows cost nothing.

M rows, D contracted width, F output width, E experts, B rows of a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_BLOCK = 256
MIN_BLOCK = 32


def blocked_matmul(rows, weights, group_sizes):
    """`grouped_matmul` by blocks; shapes as there."""
    if rows.shape[0] == 0:
        return jnp.zeros((0, weights.shape[2]), rows.dtype)
    return _blocked(rows, weights, group_sizes, _block_size(rows.shape[0], weights.shape[0]))


def _block_size(m, n_experts):
    """About a quarter of the mean group, a power of two: half a block a group is computed in vain."""
    size = MAX_BLOCK
    while size > MIN_BLOCK and size * 4 * n_experts > m:
        size //= 2
    return min(size, m)


class _Blocks(NamedTuple):
    """Where each block lies; entries past `count` are meaningless."""

    count: jax.Array  # []
    expert: jax.Array  # [max blocks]
    start: jax.Array  # [max blocks], first row, moved back where the block would run past the last row
    first: jax.Array  # [max blocks], first row that belongs to the block
    last: jax.Array  # [max blocks], one past the last row that belongs to the block


def _blocks(group_sizes, m, size):
    n_experts = group_sizes.shape[0]
    group_ends = jnp.cumsum(group_sizes)
    per_group = (group_sizes + size - 1) // size
    block_ends = jnp.cumsum(per_group)
    block = jnp.arange(m // size + n_experts)
    expert = jnp.minimum(jnp.searchsorted(block_ends, block, side="right", method="compare_all"), n_experts - 1)
    within = block - (block_ends - per_group)[expert]
    first = (group_ends - group_sizes)[expert] + within * size
    last = jnp.minimum(first + size, group_ends[expert])
    return _Blocks(block_ends[-1], expert, jnp.minimum(first, m - size), first, last)


def _product(rows, weights, group_sizes, size, transpose):
    """`[M, D] x [E, D, F] -> [M, F]`, or with `transpose`, `[M, F] x [E, D, F] -> [M, D]`."""
    m = rows.shape[0]
    width = weights.shape[1] if transpose else weights.shape[2]
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    blocks = _blocks(group_sizes, m, size)
    row = jnp.arange(size)[:, None]

    def step(b, out):
        start = blocks.start[b]
        x = jax.lax.dynamic_slice_in_dim(rows, start, size)
        w = jax.lax.dynamic_index_in_dim(weights, blocks.expert[b], keepdims=False)
        y = jax.lax.dot_general(
            x, w, (((1,), (1 if transpose else 0,)), ((), ())), preferred_element_type=accumulator
        ).astype(rows.dtype)
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        y = jnp.where(mine, y, jax.lax.dynamic_slice_in_dim(out, start, size))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros((m, width), rows.dtype))


def _weight_gradient(rows, g, group_sizes, size):
    """`[M, D], [M, F] -> [E, D, F]`, each expert's `rows^T g`, accumulated in float32 at least."""
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    blocks = _blocks(group_sizes, rows.shape[0], size)
    row = jnp.arange(size)[:, None]

    def step(b, out):
        start, expert = blocks.start[b], blocks.expert[b]
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        x = jnp.where(mine, jax.lax.dynamic_slice_in_dim(rows, start, size), 0)
        y = jnp.where(mine, jax.lax.dynamic_slice_in_dim(g, start, size), 0)
        product = jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=accumulator)
        product = product + jax.lax.dynamic_index_in_dim(out, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, product, expert, 0)

    shape = (group_sizes.shape[0], rows.shape[1], g.shape[1])
    return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros(shape, accumulator)).astype(rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(rows, weights, group_sizes, size):
    return _product(rows, weights, group_sizes, size, transpose=False)


def _forward(rows, weights, group_sizes, size):
    return _blocked(rows, weights, group_sizes, size), (rows, weights, group_sizes)


def _backward(size, residuals, g):
    rows, weights, group_sizes = residuals
    d_rows = _product(g, weights, group_sizes, size, transpose=True)
    d_weights = _weight_gradient(rows, g, group_sizes, size)
    return d_rows, d_weights, None


_blocked.defvjp(_forward, _backward)

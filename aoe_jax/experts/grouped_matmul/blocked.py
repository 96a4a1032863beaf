"""Plain JAX, for any platform: the first B rows of every group in one batched matmul, the rest block by block.

B is a little more than the mean group, so with balanced loads almost all rows go through the batched product, which reads
every expert's weights in place. What is left of larger groups goes through a loop over blocks of rows in expert order, each
block one dense matmul; its trip count is dynamic. Where groups are so uneven, or so many rows unused, that less than half of
the batched product would be useful, all rows go through the loop: never more is done than about twice the useful work and a
block a group.

M rows, D contracted width, F output width, E experts, B rows of a group's head, S rows of a block.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROW_MULTIPLE = 16  # of B
MAX_BLOCK = 128


def blocked_matmul(rows, weights, group_sizes):
    """`grouped_matmul` by a batched product and blocks; shapes as there."""
    if rows.shape[0] == 0:
        return jnp.zeros((0, weights.shape[2]), rows.dtype)
    return _blocked(rows, weights, group_sizes)


def _head_and_block(m, n_experts):
    """`(B, S)`: the mean group and 1.5 standard deviations of a group of random choices; a quarter of it, a power of two."""
    mean = m / n_experts
    head = math.ceil((mean + 1.5 * math.sqrt(mean)) / ROW_MULTIPLE) * ROW_MULTIPLE
    block = ROW_MULTIPLE
    while block < MAX_BLOCK and 8 * block <= head:
        block *= 2
    return min(head, m), min(block, m)


class _Layout(NamedTuple):
    """Where the rows of each group lie, and which of them are the batched product's."""

    start: jax.Array  # [E], first row of each group
    end: jax.Array  # [E], one past its last row
    is_batched: jax.Array  # [], whether the batched product is worth it
    head: jax.Array  # [E], rows of each group that are its own: B or the whole group, or none


def _layout(group_sizes, m):
    size, _ = _head_and_block(m, group_sizes.shape[0])
    end = jnp.cumsum(group_sizes)
    head = jnp.minimum(group_sizes, size)
    is_batched = 2 * head.sum() >= size * group_sizes.shape[0]
    return _Layout(end - group_sizes, end, is_batched, jnp.where(is_batched, head, 0))


class _Blocks(NamedTuple):
    """Where each block of the loop lies; entries past `count` are meaningless."""

    count: jax.Array  # []
    expert: jax.Array  # [max blocks]
    start: jax.Array  # [max blocks], first row, moved back where the block would run past the last row
    first: jax.Array  # [max blocks], first row that belongs to the block
    last: jax.Array  # [max blocks], one past the last row that belongs to the block


def _blocks(layout, m, size):
    n_experts = layout.end.shape[0]
    rest = layout.end - layout.start - layout.head
    per_group = (rest + size - 1) // size
    block_ends = jnp.cumsum(per_group)
    block = jnp.arange(m // size + n_experts)
    expert = jnp.minimum(jnp.searchsorted(block_ends, block, side="right", method="compare_all"), n_experts - 1)
    within = block - (block_ends - per_group)[expert]
    first = (layout.start + layout.head)[expert] + within * size
    last = jnp.minimum(first + size, layout.end[expert])
    return _Blocks(block_ends[-1], expert, jnp.minimum(first, m - size), first, last)


def _heads(rows, layout, size):
    """The first B rows of every group, `[M, D] -> [E, B, D]`; past the end of a short group, zeros.

    Not whatever lies there: it may be a row of no group, and NaN.
    """
    within = jnp.arange(size)
    index = jnp.where(within < layout.head[:, None], layout.start[:, None] + within, rows.shape[0])
    return rows.at[index].get(mode="fill", fill_value=0)


def _from_heads(heads, layout, m):
    """The inverse, `[E, B, D] -> [M, D]`; zeros for rows that are in no head."""
    n_experts, size, width = heads.shape
    row = jnp.arange(m)
    expert = jnp.minimum(jnp.searchsorted(layout.end, row, side="right", method="compare_all"), n_experts - 1)
    within = row - layout.start[expert]
    index = jnp.where(within < layout.head[expert], expert * size + within, n_experts * size)
    return heads.reshape(n_experts * size, width).at[index].get(mode="fill", fill_value=0)


def _batched_product(heads, weights, contracted):
    """`[E, B, D] x [E, D, F] -> [E, B, F]`, or over the last axis of the weights where `contracted` is 2."""
    accumulator = jnp.promote_types(heads.dtype, jnp.float32)
    dimensions = (((2,), (contracted,)), ((0,), (0,)))
    return jax.lax.dot_general(heads, weights, dimensions, preferred_element_type=accumulator).astype(heads.dtype)


def _batched_gradient(rows, g):
    """`[E, B, D], [E, B, F] -> [E, D, F]`, accumulated in float32 at least."""
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.dot_general(rows, g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=accumulator)


def _add_block_products(out, rows, weights, blocks, size, contracted):
    """Writes the products of the blocks into `out [M, F]`."""
    accumulator = jnp.promote_types(rows.dtype, jnp.float32)
    row = jnp.arange(size)[:, None]

    def step(b, out):
        start = blocks.start[b]
        x = jax.lax.dynamic_slice_in_dim(rows, start, size)
        w = jax.lax.dynamic_index_in_dim(weights, blocks.expert[b], keepdims=False)
        dimensions = (((1,), (contracted - 1,)), ((), ()))
        y = jax.lax.dot_general(x, w, dimensions, preferred_element_type=accumulator).astype(rows.dtype)
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        y = jnp.where(mine, y, jax.lax.dynamic_slice_in_dim(out, start, size))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return jax.lax.fori_loop(0, blocks.count, step, out)


def _add_block_gradients(out, rows, g, blocks, size):
    """Adds the weight gradients of the blocks to `out [E, D, F]`."""
    row = jnp.arange(size)[:, None]

    def step(b, out):
        start, expert = blocks.start[b], blocks.expert[b]
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        x, y = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, start, size), 0) for a in (rows, g))
        product = jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=out.dtype)
        product = product + jax.lax.dynamic_index_in_dim(out, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, product, expert, 0)

    return jax.lax.fori_loop(0, blocks.count, step, out)


@jax.custom_vjp
def _blocked(rows, weights, group_sizes):
    m, n_experts = rows.shape[0], weights.shape[0]
    head_size, block_size = _head_and_block(m, n_experts)
    layout = _layout(group_sizes, m)
    out = jax.lax.cond(
        layout.is_batched,
        lambda: _from_heads(_batched_product(_heads(rows, layout, head_size), weights, 1), layout, m),
        lambda: jnp.zeros((m, weights.shape[2]), rows.dtype),
    )
    return _add_block_products(out, rows, weights, _blocks(layout, m, block_size), block_size, 1)


def _forward(rows, weights, group_sizes):
    return _blocked(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, g):
    rows, weights, group_sizes = residuals
    m, n_experts = rows.shape[0], weights.shape[0]
    head_size, block_size = _head_and_block(m, n_experts)
    layout = _layout(group_sizes, m)

    def batched():
        g_heads = _heads(g, layout, head_size)
        d_rows = _from_heads(_batched_product(g_heads, weights, 2), layout, m)
        return d_rows, _batched_gradient(_heads(rows, layout, head_size), g_heads)

    def nothing():
        return jnp.zeros_like(rows), jnp.zeros(weights.shape, jnp.promote_types(rows.dtype, jnp.float32))

    d_rows, d_weights = jax.lax.cond(layout.is_batched, batched, nothing)
    blocks = _blocks(layout, m, block_size)
    d_rows = _add_block_products(d_rows, g, weights, blocks, block_size, 2)
    d_weights = _add_block_gradients(d_weights, rows, g, blocks, block_size)
    return d_rows, d_weights.astype(rows.dtype), None


_blocked.defvjp(_forward, _backward)

"""Plain JAX, for any platform: one batched matmul multiplies the first B rows of every group, and a
loop multiplies the other rows block by block.

B is a little more than the mean group size, so with balanced loads the batched matmul computes
almost all rows. Its input has N = E B positions, B for each expert, called the expert's stretch. It
multiplies each stretch by the weights of its expert. The first B rows of a group, its head, are in
the stretch of their expert. Other rows of large groups are at free positions of other stretches,
where the batched matmul multiplies them by the wrong weights. A loop of dynamic length overwrites
these products with one dense matmul per block of S rows. If less than half of the batched product
would be useful, the loop computes all rows. So the work is at most about twice the useful work plus
two blocks per group. `__init__.py` lists the other letters.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.moe.grouped_matmul.groups import NOWHERE, dot, find, group_sizes_of, permute

ROW_MULTIPLE = 16  # B is a multiple of it, unless B is M
MAX_BLOCK = 128


def blocked_matmul(rows, weights, groups):
    """The backend "blocked" of `grouped_matmul`, with its arguments; rows are in expert order."""
    layout = row_layout(group_sizes_of(groups), rows.shape[0])
    out = layout_matmul(permute(rows, layout.row, layout.position), weights, layout)
    return permute(out, layout.position, layout.row)


def _head_and_block(m, n_experts):
    """`(B, S)`, both at most m: B is the mean group size plus 1.5 standard deviations for random
    routing; S is the least power of two above B / 8, from `ROW_MULTIPLE` to `MAX_BLOCK`.
    """
    mean = m / n_experts
    head = math.ceil((mean + 1.5 * math.sqrt(mean)) / ROW_MULTIPLE) * ROW_MULTIPLE
    block = ROW_MULTIPLE
    while block < MAX_BLOCK and 8 * block <= head:
        block *= 2
    return min(head, m), min(block, m)


class _Blocks(NamedTuple):
    """The blocks of the loop; entries past `count` are meaningless."""

    count: jax.Array  # []
    expert: jax.Array  # [max blocks], the expert of the block's rows
    stretch: jax.Array  # [max blocks], the stretch of positions that contains the block
    # [max blocks], start of the slice that the loop loads: `first`, or less at the array's end.
    start: jax.Array
    first: jax.Array  # [max blocks], first position that belongs to the block
    last: jax.Array  # [max blocks], one past the last position that belongs to the block


class RowLayout(NamedTuple):
    """A group's first B rows are in its expert's stretch; other rows are at free positions."""

    # [M] int32, the position of each row, in expert order; NOWHERE for rows past the last group.
    position: jax.Array
    row: jax.Array  # [N] int32, the row at each position; NOWHERE if the position is free
    # [] bool, whether the batched product is used; if not, row i is at position i.
    is_batched: jax.Array
    blocks: _Blocks  # blocks of the rows outside all heads


def row_layout(group_sizes, m):
    """`RowLayout` of m rows in groups of `group_sizes [E]`."""
    n_experts = group_sizes.shape[0]
    size, block_size = _head_and_block(m, n_experts)
    head = jnp.minimum(group_sizes, size)
    is_batched = 2 * head.sum() >= size * n_experts
    head = jnp.where(is_batched, head, 0)
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    # The i-th row outside all heads is at the i-th free position.
    rest_end, free_end = jnp.cumsum(group_sizes - head), jnp.cumsum(size - head)
    # Offsets: the i-th of these is row i + to_row[expert], at position i + to_position[stretch].
    to_row = end - rest_end
    to_position = size * jnp.arange(1, n_experts + 1) - free_end

    row = jnp.arange(m, dtype=jnp.int32)
    expert = find(end, row)
    count = row - to_row[expert]
    position = jnp.where(
        row - start[expert] < head[expert],
        expert * size + row - start[expert],
        count + to_position[find(free_end, count)],
    )
    position = jnp.where(row < end[-1], position, NOWHERE)

    stretch, within = jnp.divmod(jnp.arange(n_experts * size, dtype=jnp.int32), size)
    count = stretch * size + within - to_position[stretch]
    row = jnp.where(count < rest_end[-1], count + to_row[find(rest_end, count)], NOWHERE)
    row = jnp.where(within < head[stretch], start[stretch] + within, row)

    # A run is a range of rows outside all heads, with one expert and one stretch. Blocks split it.
    run_end = jnp.minimum(jnp.sort(jnp.concatenate([rest_end, free_end])), rest_end[-1])
    run_start = jnp.concatenate([jnp.zeros_like(run_end[:1]), run_end[:-1]])
    per_run = (run_end - run_start + block_size - 1) // block_size
    block_end = jnp.cumsum(per_run)
    block = jnp.arange(m // block_size + 2 * n_experts)
    run = find(block_end, block)
    first = run_start[run] + (block - (block_end - per_run)[run]) * block_size
    last = jnp.minimum(first + block_size, run_end[run])
    expert, stretch = find(rest_end, first), find(free_end, first)
    first, last = first + to_position[stretch], last + to_position[stretch]
    block_start = jnp.minimum(first, n_experts * size - block_size)
    blocks = _Blocks(block_end[-1], expert, stretch, block_start, first, last)
    # Without the barrier XLA recomputes the index for every element of the rows that it gathers.
    return jax.lax.optimization_barrier(RowLayout(position, row, is_batched, blocks))


def _add_block_products(out, rows, weights, layout, contracted):
    """Writes the products of the blocks into `out [N, F]`."""
    blocks, size = layout.blocks, _head_and_block(layout.position.shape[0], weights.shape[0])[1]
    row = jnp.arange(size)[:, None]

    def step(b, out):
        start = blocks.start[b]
        x = jax.lax.dynamic_slice_in_dim(rows, start, size)
        w = jax.lax.dynamic_index_in_dim(weights, blocks.expert[b], keepdims=False)
        y = dot(x, w, (1, contracted - 1)).astype(rows.dtype)
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        y = jnp.where(mine, y, jax.lax.dynamic_slice_in_dim(out, start, size))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return jax.lax.fori_loop(0, blocks.count, step, out)


def _add_block_gradients(out, rows, g, layout):
    """Adds each block's gradient to the block's expert in `out [E, D, F]`. The batched product, if
    it was used, added the gradient to the expert of the stretch; it is subtracted there.
    """
    blocks, size = layout.blocks, _head_and_block(layout.position.shape[0], out.shape[0])[1]
    row = jnp.arange(size)[:, None]

    def add(out, expert, product):
        product = product + jax.lax.dynamic_index_in_dim(out, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(out, product, expert, 0)

    def step(b, out):
        start = blocks.start[b]
        mine = (row >= blocks.first[b] - start) & (row < blocks.last[b] - start)
        x, y = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, start, size), 0) for a in (rows, g))
        product = dot(x, y, (0, 0))
        out = add(out, blocks.expert[b], product)
        return add(out, blocks.stretch[b], jnp.where(layout.is_batched, -product, 0))

    return jax.lax.fori_loop(0, blocks.count, step, out)


@jax.custom_vjp
def layout_matmul(rows, weights, layout):
    """`[N, D] x [E, D, F] -> [N, F]` in a `RowLayout`; positions without a row must be zero."""
    return _product(rows, weights, layout, 1)


def _product(rows, weights, layout, contracted):
    """`[N, D] x [E, D, F] -> [N, F]`; `contracted=2` contracts the weights' last axis."""
    n_experts, width = weights.shape[0], weights.shape[3 - contracted]

    def batched():
        out = dot(_stretches(rows, n_experts), weights, (2, contracted), batch=(0,))
        return out.astype(rows.dtype).reshape(-1, width)

    out = jax.lax.cond(
        layout.is_batched, batched, lambda: jnp.zeros((rows.shape[0], width), rows.dtype)
    )
    return _add_block_products(out, rows, weights, layout, contracted)


def _gradient(rows, g, layout, n_experts):
    """The gradient of the weights: `[N, D], [N, F] -> [E, D, F]`."""
    out = jax.lax.cond(
        layout.is_batched,
        lambda: dot(_stretches(rows, n_experts), _stretches(g, n_experts), (1, 1), batch=(0,)),
        lambda: jnp.zeros(
            (n_experts, rows.shape[1], g.shape[1]), jnp.promote_types(rows.dtype, jnp.float32)
        ),
    )
    return _add_block_gradients(out, rows, g, layout).astype(rows.dtype)


def _stretches(rows, n_experts):
    return rows.reshape(n_experts, -1, rows.shape[1])


def _backward(residuals, g):
    rows, weights, layout = residuals
    return _product(g, weights, layout, 2), _gradient(rows, g, layout, weights.shape[0]), None


layout_matmul.defvjp(lambda *args: (layout_matmul(*args), args), _backward)

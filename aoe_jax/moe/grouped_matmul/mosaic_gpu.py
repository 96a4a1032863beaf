"""Mosaic GPU for Hopper: JAX's Pallas kernels `ragged_dot` and `transposed_ragged_dot`.

They have no derivative; this module defines it:

    forward    rows [M, D]  x weights [E, D, F]   -> [M, F]      ragged_dot
    d_rows     g [M, F]     x weights [E, D, F]^T -> [M, D]      ragged_dot, transpose_rhs
    d_weights  rows [M, D]^T x g [M, F]           -> [E, D, F]   transposed_ragged_dot

The kernels use `wgmma` instructions of Hopper (compute capability 9.0): neither an A100 nor a B200
runs them. `transposed_ragged_dot` asks the first device of the process for its number of
cores, so without a GPU the derivative compiles only inside `hardware.compiling_for`.
"""

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul.groups import group_sizes_of, zero_past_groups

DTYPES = ("bfloat16", "float16")
WIDTH_BLOCK = 64  # D and F are padded to multiples of 64 elements, a 128-byte row of shared memory
ROW_BLOCKS = (128, 64)
# Limit in bytes: the weights of one pass over an expert's rows stay in the L2 cache (50 MB).
CACHED_BYTES = 16 * 2**20
CONCURRENT_STEPS = 4  # pipeline steps; with blocks of 128 they use 160 of 227 KiB shared memory


def mosaic_gpu_matmul(rows, weights, groups):
    """The backend "mosaic_gpu" of `grouped_matmul`. Raises the `UserError` of `check`."""
    check(rows.dtype)
    (m, d), f = rows.shape, weights.shape[2]
    depth, width = -d % WIDTH_BLOCK, -f % WIDTH_BLOCK
    rows, weights = _padded(rows, -m % ROW_BLOCKS[0], depth), _padded(weights, 0, depth, width)
    return _mosaic_gpu(rows, weights, groups)[:m, :f]


def _padded(a, *after):
    """Pads the end of each axis. Without padding `a` itself is returned, so that autodiff keeps
    rows of several products once.
    """
    return jnp.pad(a, [(0, n) for n in after]) if any(after) else a


def check(dtype):
    """Raises `UserError` unless `dtype` is bfloat16 or float16."""
    if dtype not in DTYPES:
        raise UserError(
            f"grouped_matmul backend='mosaic_gpu' with {dtype}: use {' or '.join(DTYPES)}, "
            "or backend 'blocked'"
        )


def row_block(m, n_experts):
    """Rows of a block: 128, or 64 if over 1/16 of the blocks could have rows of two groups."""
    return next((block for block in ROW_BLOCKS if block * 16 * n_experts <= m), ROW_BLOCKS[-1])


def width_block(width):
    """The block of a width: 128 if it divides the width, else 64."""
    return 2 * WIDTH_BLOCK if width % (2 * WIDTH_BLOCK) == 0 else WIDTH_BLOCK


def blocks_at_once(depth, width):
    """The number of blocks of the output width that the kernel computes in one pass over the rows.
    Their weights fit in `CACHED_BYTES`. Every pass loads all rows.
    """
    block = width_block(width)
    return min(width // block, max(1, CACHED_BYTES // (2 * depth * block)))


def _product(rows, weights, groups, transpose_rhs):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    width = weights.shape[1 if transpose_rhs else 2]
    out = ragged_dot(
        rows,
        weights,
        group_sizes=group_sizes_of(groups),
        block_m=row_block(rows.shape[0], weights.shape[0]),
        block_n=width_block(width),
        block_k=WIDTH_BLOCK,
        max_concurrent_steps=CONCURRENT_STEPS,
        grid_block_n=blocks_at_once(rows.shape[1], width),
        transpose_rhs=transpose_rhs,
    )
    # The kernel leaves rows past the last group unwritten.
    return zero_past_groups(out, groups)


def _weight_gradient(rows, g, groups):
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    return transposed_ragged_dot(
        rows,
        g,
        group_sizes=group_sizes_of(groups),
        block_m=width_block(rows.shape[1]),
        block_n=width_block(g.shape[1]),
        block_k=WIDTH_BLOCK,
        max_concurrent_steps=CONCURRENT_STEPS,
        grid_block_n=1,
    )


@jax.custom_vjp
def _mosaic_gpu(rows, weights, groups):
    return _product(rows, weights, groups, transpose_rhs=False)


def _forward(rows, weights, groups):
    # The kernel for d_weights multiplies rows past the last group by zero, so a NaN would remain.
    # This mask removes it, and fuses with the operations that compute the rows.
    rows = zero_past_groups(rows, groups)
    return _mosaic_gpu(rows, weights, groups), (rows, weights, groups)


def _backward(residuals, g):
    rows, weights, groups = residuals
    g = zero_past_groups(g, groups)
    d_rows = _product(g, weights, groups, transpose_rhs=True)
    return d_rows, _weight_gradient(rows, g, groups), None


_mosaic_gpu.defvjp(_forward, _backward)

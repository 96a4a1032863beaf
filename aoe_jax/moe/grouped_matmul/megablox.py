"""Megablox for TPU: JAX's Pallas kernels `gmm` and `tgmm`, with tiles chosen for each product.

JAX's own derivative of `gmm` uses the forward tiles for the backward products. Their blocks can be
larger and exceed the VMEM, so this module defines the derivative with the same kernels:

    forward    rows [M, D]  x weights [E, D, F]   -> [M, F]      gmm
    d_rows     g [M, F]     x weights [E, D, F]^T -> [M, D]      gmm, transpose_rhs
    d_weights  rows [M, D]^T x g [M, F]           -> [E, D, F]   tgmm

On CPU the kernels run in Pallas's interpreter, which is slow and meant for tests.

A tile of `gmm` has tm rows, tk elements of the contracted width and tn of the output width; a tile
of `tgmm` has tm of the contracted rows, tk elements of D and tn of F.
"""

import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul.groups import group_sizes_of, zero_results

DTYPES = ("bfloat16", "float32")
LANES = 128  # a tile of a width is the whole width or a multiple of this
SUBLANES = 16  # a tile of rows is a multiple of this; float32 needs only 8
MIN_ROWS, MAX_ROWS = 128, 512
# Limit of a tile's width, by bytes per element; `gmm` may exceed it with blocks that fit in VMEM.
MAX_WIDTH = {2: 1024, 4: 512}
# Limit in bytes for the blocks of a kernel. On TPUs with the least VMEM the compiler allows 16 MiB.
VMEM_BYTES = 14 * 2**20


def megablox_matmul(rows, weights, groups):
    """The backend "megablox" of `grouped_matmul`, for TPU v4 and later; interpreted on CPU.

    M, D, F and E are arbitrary. Rows are padded to whole tiles if no tile of at least `MIN_ROWS`
    divides M. Raises `UserError` for a dtype other than bfloat16 and float32.
    """
    check(rows.dtype)
    return _megablox(rows, weights, groups)


def check(dtype):
    """Raises `UserError` unless `dtype` is bfloat16 or float32."""
    if dtype not in DTYPES:
        raise UserError(
            f"grouped_matmul backend='megablox' with {dtype}: use {' or '.join(DTYPES)}"
        )


def row_tile(m, n_experts):
    """Rows of a tile: a power of two from 128 to 512, at most a sixteenth of the mean group if
    possible, and a divisor of M if possible. Fewer than 128 rows are one tile.

    A tile with rows of two groups is computed twice, which wastes up to E - 1 tiles: 1/16 of the
    work, or more if groups are small. Tiles below 128 rows would leave the matrix unit idle.
    """
    if m < MIN_ROWS:
        return round_up(m, SUBLANES)
    tile = MAX_ROWS
    while tile > MIN_ROWS and (tile * 16 * n_experts > m or m % tile):
        tile //= 2
    return tile


def width_tile(width, limit):
    """The width, at most `limit`; else the multiple of 128 above `limit / 2` with least padding."""
    if width <= limit:
        return width
    return min(range(limit, limit // 2 - 1, -LANES), key=lambda tile: round_up(width, tile))


def tiles(m, d, f, n_experts, itemsize):
    """`(tm, tk, tn)` of each product, by name: `"forward"`, `"d_rows"`, `"d_weights"`.

    `d` and `f` are the contracted and the output width of the forward product.
    """
    tm, limit = row_tile(m, n_experts), MAX_WIDTH[itemsize]
    return {
        "forward": (tm, *_depth_and_width(m, d, f, n_experts, itemsize)),
        "d_rows": (tm, *_depth_and_width(m, f, d, n_experts, itemsize)),
        "d_weights": (tm, width_tile(d, limit), width_tile(f, limit)),
    }


def _depth_and_width(m, k, n, n_experts, itemsize):
    """The `(tk, tn)` with the least memory traffic for rows `[m, k]` times weights `[E, k, n]`."""
    tm, limit = row_tile(m, n_experts), MAX_WIDTH[itemsize]
    tiles = [(width_tile(k, limit), width_tile(n, limit))]
    # tk is k only if k is a multiple of 128 or at most `limit`, else masked copies need memory.
    counts = range(1, math.ceil(n / LANES) + 1) if k <= limit or k % LANES == 0 else ()
    for count in counts:
        tn = n if count == 1 else round_up(math.ceil(n / count), LANES)
        # Blocks are double-buffered; the accumulator is float32.
        if 2 * itemsize * (tm * k + k * tn + tm * tn) + 4 * tm * tn <= VMEM_BYTES:
            tiles.append((k, tn))
            break
    return min(tiles, key=lambda tile: reads(m, k, n, n_experts, tm, *tile))


def reads(m, k, n, n_experts, tm, tk, tn):
    """The number of elements that a product loads: rows once for each tile of n; weights once if tk
    is k, otherwise once for each tile of rows.
    """
    return math.ceil(n / tn) * m * k + k * n * (n_experts if tk == k else m / tm)


def round_up(value, multiple):
    """The least multiple that is at least `value`."""
    return -(-value // multiple) * multiple


def _run_kernel(name, *operands, **settings):
    """Runs a Megablox kernel, compiled on TPU, interpreted on CPU."""
    # `import_module`, because the function `gmm` of the package hides its module `gmm`.
    kernel = getattr(importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm"), name)
    run = partial(kernel, preferred_element_type=operands[0].dtype, **settings)
    return jax.lax.platform_dependent(*operands, tpu=run, cpu=partial(run, interpret=True))


def padded(rows, tile):
    """`rows` and zeros up to a multiple of `tile`."""
    m = rows.shape[0]
    return jnp.pad(rows, ((0, round_up(m, tile) - m), (0, 0))) if m % tile else rows


def _tiles(rows, weights):
    return tiles(*rows.shape, weights.shape[2], weights.shape[0], rows.dtype.itemsize)


@jax.custom_vjp
def _megablox(rows, weights, groups):
    tiling = _tiles(rows, weights)["forward"]
    whole, sizes = padded(rows, tiling[0]), group_sizes_of(groups)
    out = _run_kernel("gmm", whole, weights, sizes, tiling=tiling)
    # The kernel leaves rows past the last group unwritten.
    return zero_results(out[: rows.shape[0]], groups)


def gradients(rows, weights, groups, g):
    """The gradients of `rows` and `weights`, for the gradient `g [M, F]` of their product."""
    tiling, sizes, m = _tiles(rows, weights), group_sizes_of(groups), rows.shape[0]
    of_g = padded(g, tiling["forward"][0])
    d_rows = _run_kernel("gmm", of_g, weights, sizes, tiling=tiling["d_rows"], transpose_rhs=True)
    return zero_results(d_rows[:m], groups), weight_gradients(rows, g, groups, len(weights))


def weight_gradients(rows, g, groups, n_experts):
    """The gradient of weights, `[E, D, F]`, for `rows [M, D]` and a gradient `g [M, F]`."""
    tiling = tiles(*rows.shape, g.shape[1], n_experts, rows.dtype.itemsize)
    rows, g = (padded(a, tiling["forward"][0]) for a in (rows, g))
    return _run_kernel("tgmm", rows.T, g, group_sizes_of(groups), tiling=tiling["d_weights"])


_megablox.defvjp(
    lambda *args: (_megablox(*args), args), lambda args, g: (*gradients(*args, g), None)
)

"""Megablox for TPU: the Pallas kernels `gmm` and `tgmm` that come with JAX, with tiles chosen for
each product.

JAX's own derivative of `gmm` uses the forward tiles for the backward products too, where they may
not fit; so only the kernels are taken from there, and the derivative is written here:

    forward    rows [M, D]  x weights [E, D, F]   -> [M, F]      gmm
    d_rows     g [M, F]     x weights [E, D, F]^T -> [M, D]      gmm, transpose_rhs
    d_weights  rows [M, D]^T x g [M, F]           -> [E, D, F]   tgmm

On CPU the kernels run in Pallas's interpreter: slow, for tests.

M rows, D contracted width, F output width, E experts; tiles: tm of rows, tk and tn of the two
widths.
"""

import importlib
import math

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError

DTYPES = ("bfloat16", "float32")
LANES = 128  # a tile of a width is the whole width or a multiple of this
SUBLANES = 16  # a tile of rows is a multiple of this; float32 would do with 8
MIN_ROWS, MAX_ROWS = 128, 512
# The largest tile of a width, by bytes of an element. With these every product stays within the 16
# MiB of VMEM that the compiler gives a kernel on the smallest generations.
MAX_WIDTH = {2: 1024, 4: 512}


def megablox_matmul(rows, weights, group_sizes):
    """`grouped_matmul` by Megablox; shapes as there. TPU v4 and later; interpreted on CPU.

    Any M, D, F and E will do. Rows are padded to whole tiles where no tile of at least `MIN_ROWS`
    divides M.

    Raises:
      UserError: a dtype other than bfloat16 and float32.
    """
    if rows.dtype not in DTYPES:
        raise UserError(
            f"grouped_matmul backend='megablox' with {rows.dtype}: use {' or '.join(DTYPES)}"
        )
    if 0 in rows.shape or 0 in weights.shape:
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    return _megablox(rows, weights, group_sizes)


def row_tile(m, n_experts):
    """Rows of a tile: a sixteenth of the mean group, as a power of two from 128 to 512, that
    divides M if it can be.

    A tile that two groups share is computed for both, so up to E - 1 tiles are computed in vain: at
    a sixteenth of the mean group that is 1/16 of the work at most. Groups too small for it pay
    more, since a tile under 128 rows would leave the matrix unit idle. Fewer than 128 rows in all
    are one tile.
    """
    if m < MIN_ROWS:
        return _round_up(m, SUBLANES)
    tile = MAX_ROWS
    while tile > MIN_ROWS and (tile * 16 * n_experts > m or m % tile):
        tile //= 2
    return tile


def width_tile(width, limit):
    """The whole width up to `limit`; beyond, the multiple of 128 from `limit / 2` to `limit` that
    pads least.
    """
    if width <= limit:
        return width
    return min(range(limit, limit // 2 - 1, -LANES), key=lambda tile: _round_up(width, tile))


def tiles(m, d, f, n_experts, itemsize):
    """`(tm, tk, tn)` for each of the three products, as the kernels want them.

    Args:
      m: rows. d: contracted width of the forward product. f: its output width.
      n_experts: E. itemsize: bytes of an element, 2 or 4.

    Returns:
      dict of `"forward"`, `"d_rows"`, `"d_weights"`.
    """
    tm, limit = row_tile(m, n_experts), MAX_WIDTH[itemsize]
    td, tf = width_tile(d, limit), width_tile(f, limit)
    return {"forward": (tm, td, tf), "d_rows": (tm, tf, td), "d_weights": (tm, td, tf)}


def kernel_cost(name, operands, results):
    """The cost of a kernel, as `aoe_jax.costs.Program` takes it; None for other kernels.

    Rows are read once for each tile of the output's width, weights once if one tile has their whole
    depth, else for every tile of rows. The kernel lists the tiles of rows by group; a tile that two
    groups share is there, and is computed, twice.
    """
    if name not in ("gmm", "tgmm"):
        return None
    (_, offsets, listed, *_, lhs, rhs), (out,) = operands, results
    limit = MAX_WIDTH[2 if lhs.dtype == "bf16" else 4]
    k, n = out.dims[1:] if name == "tgmm" else (lhs.dims[1], out.dims[1])
    m = math.prod(lhs.dims) // k
    n_groups, n_visits = offsets.dims[0] - 1, listed.dims[0]
    lhs_reads, rhs_reads = math.ceil(n / width_tile(n, limit)), 1
    if name == "tgmm":
        rhs_reads = math.ceil(k / width_tile(k, limit))
    elif k > limit:
        rhs_reads = n_visits / n_groups
    traffic = lhs_reads * lhs.hbm_bytes + rhs_reads * rhs.hbm_bytes + out.hbm_bytes
    flops = 2 * m * k * n
    return flops, traffic, flops * n_visits / (n_visits - n_groups + 1)


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


def _kernel(name, **settings):
    """A Megablox kernel for the platform it is lowered for: compiled on TPU, interpreted on CPU."""
    # The package's attribute `gmm` is the function with a derivative, which hides the module of the
    # kernels.
    kernel = getattr(importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm"), name)

    def call(lhs, rhs, group_sizes):
        return jax.lax.platform_dependent(
            lhs,
            rhs,
            group_sizes,
            tpu=lambda *args: kernel(*args, lhs.dtype, **settings),
            cpu=lambda *args: kernel(*args, lhs.dtype, interpret=True, **settings),
        )

    return call


def _used(out, group_sizes, m):
    """The first `m` rows, zero where no group reaches: the kernel leaves those unwritten."""
    return jnp.where((jnp.arange(m) < group_sizes.sum())[:, None], out[:m], 0)


def _padded(rows, tile):
    m = rows.shape[0]
    return jnp.pad(rows, ((0, _round_up(m, tile) - m), (0, 0))) if m % tile else rows


def _tiles(rows, weights):
    return tiles(*rows.shape, weights.shape[2], weights.shape[0], rows.dtype.itemsize)


@jax.custom_vjp
def _megablox(rows, weights, group_sizes):
    tiling = _tiles(rows, weights)["forward"]
    out = _kernel("gmm", tiling=tiling)(_padded(rows, tiling[0]), weights, group_sizes)
    return _used(out, group_sizes, rows.shape[0])


def _forward(rows, weights, group_sizes):
    return _megablox(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, g):
    rows, weights, group_sizes = residuals
    tiling = _tiles(rows, weights)
    rows, g = (_padded(a, tiling["forward"][0]) for a in (rows, g))
    d_rows = _kernel("gmm", tiling=tiling["d_rows"], transpose_rhs=True)(g, weights, group_sizes)
    d_weights = _kernel("tgmm", tiling=tiling["d_weights"])(rows.T, g, group_sizes)
    return _used(d_rows, group_sizes, residuals[0].shape[0]), d_weights, None


_megablox.defvjp(_forward, _backward)

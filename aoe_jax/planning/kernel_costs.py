"""Computes the costs of kernels whose FLOPs and traffic a compiled program does not state.

Each function maps `(name, operands, results)` of a custom call to `(FLOPs, bytes of HBM traffic,
occupied FLOPs)`, or to None if it does not know the kernel. All take two keywords: the fraction
`used` of the experts' rows that have an expert, and `matrix_unit`, the size of a TPU's matrix unit.
"""

import math

from aoe_jax.model.attention.splash import LANES
from aoe_jax.moe.grouped_matmul import megablox_swiglu
from aoe_jax.moe.grouped_matmul.megablox import tiles
from aoe_jax.moe.grouped_matmul.mosaic_gpu import blocks_at_once, width_block

# Kernel (result, gradient of q, gradients of k and v) -> matrix products per pair of blocks.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def splash_cost(name, operands, results, matrix_unit=128, **_):
    """Returns the cost of causal attention by the kernel Splash.

    Each block of queries loads the blocks of keys that are not entirely in its future. In `dkv`,
    each block of keys loads the blocks of queries that attend to it. The first operand, the mask,
    has a number for each pair of blocks. Heads narrower than `matrix_unit` do not fill it.
    """
    kind = name.removeprefix("splash_mha_").split("_")[0]
    if not name.startswith("splash_mha_") or kind not in _PRODUCTS:
        return None
    arrays = [a for a in operands if len(a.dims) >= 3 and a.dtype[0] in "bf"]
    if len(arrays) < 3 or len(operands[0].dims) < 2:
        return None  # another kernel of this name
    q, k, v, *others = arrays
    *_, n_heads, length, width = q.dims
    if length < LANES:  # arrays with narrow heads are stored transposed
        length, width = width, length
    n_q, n_kv = operands[0].dims[-2:]
    n_met = sum(-(-n_kv * (i + 1) // n_q) for i in range(n_q))  # pairs of blocks that are computed
    share = n_met / (n_q if kind == "dkv" else n_kv)
    if kind == "dkv":
        once, again = (k, v), (q, *others)
    else:
        once, again, share = (q, *others), (k, v), share * n_heads / k.dims[-3]
    traffic = sum(a.hbm_bytes for a in (*once, *results)) + share * sum(a.hbm_bytes for a in again)
    pairs = math.prod(q.dims[:-2]) * length**2 * n_met / (n_q * n_kv)
    occupied = -(-width // matrix_unit) * matrix_unit
    return 2 * _PRODUCTS[kind] * pairs * width, traffic, 2 * _PRODUCTS[kind] * pairs * occupied


def cudnn_cost(name, operands, results, **_):
    """Returns the cost of causal attention by cuDNN, which reads or writes each array once."""
    if not name.startswith("__cudnn$fmha"):
        return None
    *batch, length, width = results[0].dims  # the output, or the gradient of q: [B, H, S, h]
    n_products = 5 if name.endswith("Backward") else 2
    pairs = math.prod(batch) * length * (length + 1) / 2
    flops = 2 * n_products * pairs * width
    return flops, sum(a.hbm_bytes for a in (*operands, *results)), flops


def _visits(offsets, listed, used):
    """The number of groups, of tiles of used rows, and of visits: once for each group in a tile."""
    n_groups = offsets.dims[0] - 1
    n_tiles = used * (listed.dims[0] - n_groups + 1)
    return n_groups, n_tiles, n_tiles + n_groups - 1


def megablox_cost(name, operands, results, tiles=tiles, used=1.0, **_):
    """Returns the cost of a grouped product by Megablox with these `tiles`.

    Rows without an expert are not read. `lhs` is read once for each tile of the output width.
    `gmm` reads the weights once if a tile has the whole contracted width, else once for each
    tile of rows. `tgmm` computes weight gradients `[E, k, n]`: it reads `rhs` once for each
    tile of k. A tile with two groups is computed twice.
    """
    if name not in ("gmm", "tgmm"):
        return None
    (_, offsets, listed, *_, lhs, rhs), (out,) = operands, results
    k, n = out.dims[1:] if name == "tgmm" else (lhs.dims[1], out.dims[1])
    m = math.prod(lhs.dims) // k
    n_groups, n_tiles, n_visits = _visits(offsets, listed, used)
    # A `gmm` is a forward product or a gradient of rows; both choose tiles by the same rule.
    product = "d_weights" if name == "tgmm" else "forward"
    itemsize = 2 if lhs.dtype == "bf16" else 4
    _, tk, tn = tiles(m, k, n, n_groups, itemsize)[product]
    rhs_reads = math.ceil(k / tk)
    if name == "gmm" and tk < k:
        rhs_reads = n_visits / n_groups
    of_rhs, of_out = (used, 1) if name == "tgmm" else (1, used)
    traffic = math.ceil(n / tn) * used * lhs.hbm_bytes
    traffic += rhs_reads * of_rhs * rhs.hbm_bytes + of_out * out.hbm_bytes
    flops = 2 * used * m * k * n
    return flops, traffic, flops * n_visits / n_tiles


def swiglu_cost(name, operands, results, used=1.0, **_):
    """Returns the cost of a kernel of `megablox_swiglu`. It reads and writes tiles of the output
    once; rows and weights as `gmm` in `megablox_cost`. Weights of rows count once.
    """
    if name not in ("swiglu", "swiglu_backward", "gmm_add"):
        return None
    _, offsets, listed, _, rows, weights, *others = operands
    (m, k), n = rows.dims, results[0].dims[1]
    n_groups, n_tiles, n_visits = _visits(offsets, listed, used)
    itemsize = 2 if rows.dtype == "bf16" else 4
    _, tk, tn = megablox_swiglu.tiles(m, k, n, n_groups, itemsize, len(results) + 1)
    of_rows = math.ceil(n / tn) * rows.hbm_bytes + sum(a.hbm_bytes for a in (*others, *results))
    flops = 2 * used * m * k * n
    traffic = used * of_rows + weights.hbm_bytes * (n_visits / n_groups if tk < k else 1)
    return flops, traffic, flops * n_visits / n_tiles


def mosaic_gpu_cost(name, operands, results, used=1.0, **_):
    """Returns the cost of a grouped product by Mosaic GPU.

    Each pass over the output width reads all rows. Weight gradients need only one pass, because
    all blocks of an expert are computed together, in one loop over the expert's rows. Only they
    leave out rows without an expert, so only they depend on `used`.
    """
    matrices = [a for a in operands if len(a.dims) > 1]
    if not name.startswith("mosaic_gpu") or len(matrices) != 2:
        return None
    (lhs, rhs), out = matrices, results[0]
    depth, width, n_passes = lhs.dims[1], out.dims[-1], 1
    if len(out.dims) == 2:
        n_passes = math.ceil(width // width_block(width) / blocks_at_once(depth, width))
    traffic = n_passes * lhs.hbm_bytes + rhs.hbm_bytes + out.hbm_bytes
    flops = 2 * math.prod(lhs.dims) * width
    if len(out.dims) == 3:
        traffic, flops = used * (lhs.hbm_bytes + rhs.hbm_bytes) + out.hbm_bytes, used * flops
    return flops, traffic, flops


KERNEL_COSTS = (splash_cost, cudnn_cost, megablox_cost, swiglu_cost, mosaic_gpu_cost)

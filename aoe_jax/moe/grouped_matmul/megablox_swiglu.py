"""SwiGLU experts for TPU: grouped products that compute SwiGLU, its derivative, or a sum, of each
tile before they write it, so that no pass over HBM is needed between the products.

    swiglu           up = rows W_up          reads gate, writes hidden = weight SiLU(gate) * up; and
                                             up only if it is kept for the backward pass
    swiglu_backward  d_hidden = g W_down^T   reads gate and up, writes d_gate, d_up, hidden and sums
                                             for d_weight, but not d_hidden
    gmm_add          d_gate W_gate^T         reads and adds the gradient of rows from W_up

The other products are those of `megablox.py`, whose grid these kernels have: tiles of the output
width, visits of tiles of rows, tiles of the contracted width. A tile with rows of two experts is
visited once for each. On CPU the kernels run in Pallas's interpreter.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from aoe_jax.moe.grouped_matmul import megablox
from aoe_jax.moe.grouped_matmul.groups import group_sizes_of, zero_results
from aoe_jax.moe.grouped_matmul.megablox import LANES, MAX_WIDTH, VMEM_BYTES, padded

_MAX_ROWS = 256  # rows of a tile, fewer than in `megablox.py`, because more blocks share the VMEM
_TEMPORARIES = 4  # float32 tiles that SwiGLU's derivative is assumed to need


def tiles(m, k, n, n_experts, itemsize, n_blocks):
    """`(tm, tk, tn)` with the fewest reads; the kernel has `n_blocks` blocks `[tm, tn]`."""
    tm, limit = min(megablox.row_tile(m, n_experts), _MAX_ROWS), MAX_WIDTH[itemsize]
    depths, found = {megablox.width_tile(k, limit)} | ({k} if k % LANES == 0 else set()), []
    for tk in sorted(depths):
        for count in range(1, math.ceil(n / LANES) + 1):
            tn = n if count == 1 else megablox.round_up(math.ceil(n / count), LANES)
            factors = tm * tk + tk * tn
            bytes_used = 2 * itemsize * (factors + n_blocks * tm * tn)  # double-buffered
            bytes_used += 4 * (1 + _TEMPORARIES) * tm * tn
            bytes_used += 4 * factors if k % tk else 0  # masked copies
            if bytes_used <= VMEM_BYTES:
                found.append((tm, tk, tn))
                break
    return min(found, key=lambda tile: megablox.reads(m, k, n, n_experts, *tile))


def _hidden(up, gate, weight):
    gate = gate.astype(jnp.float32)
    return gate * jax.nn.sigmoid(gate) * up * weight, up


def _derivative(d_hidden, gate, up, weight):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    of_product = d_hidden * silu
    d_gate = d_hidden * weight * up * (sigmoid + silu * (1 - sigmoid))
    return d_gate, of_product * weight, silu * up * weight, of_product * up


def _product(name, finish, rows, weights, beside, groups, n_out, row_weight=None, transposed=False):
    """Runs a kernel: `finish` of each tile of the product, of the blocks of `beside`, and of the
    rows' weights.

    `rows [M, k]`, `weights [E, k, n]` (`transposed`: `[E, n, k]`), `beside` arrays `[M, n]`,
    `row_weight [M]` or None. Returns the first `n_out` results of `finish`, each `[M, n]` in the
    dtype of `rows`, and, if it has one more, its sums over n, `[M]` float32. Only a `transposed`
    product with weights of rows has sums. Rows past the last group are not written.
    """
    m, k = rows.shape
    n_experts, n = weights.shape[0], weights.shape[1 if transposed else 2]
    has_sums = transposed and row_weight is not None
    tm, tk, tn = tiles(m, k, n, n_experts, rows.dtype.itemsize, len(beside) + n_out)
    n_k, n_n = math.ceil(k / tk), math.ceil(n / tn)

    def kernel(metadata, lhs, rhs, *refs):
        (offsets, experts, row_tiles), total = metadata, refs[-1]
        outs = refs[-1 - n_out - has_sums : -1]
        others = refs[: -1 - len(outs)]
        i, visit, j = (pl.program_id(axis) for axis in range(3))

        @pl.when(j == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        a, b = lhs[...], rhs[...]
        if k % tk:  # the last blocks end after the arrays
            a = _masked(a, 1, k - j * tk)
            b = _masked(b, int(transposed), k - j * tk)
        contracted = ((1,), (int(transposed),)), ((), ())
        total[...] += jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)

        @pl.when(j == n_k - 1)
        def _():
            def is_own(shape, axis):
                row = row_tiles[visit] * tm + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                return (row >= offsets[experts[visit]]) & (row < offsets[experts[visit] + 1])

            blocks = [other[...] for other in others]
            if row_weight is not None:
                blocks[-1] = blocks[-1].T
            found = list(finish(total[...], *blocks))
            if has_sums:
                last = found[n_out] if n % tn == 0 else _masked(found[n_out], 1, n - i * tn)
                found[n_out] = last.sum(1, keepdims=True).T
            for out, value in zip(outs, found, strict=False):
                own = is_own((tm, 1), 0) if value.shape[0] == tm else is_own((1, tm), 1)
                kept = out[...].astype(jnp.float32)
                out[...] = jnp.where(own, value, kept).astype(out.dtype)

    rows_of = lambda i, visit, j, metadata: (metadata[2][visit], j)  # noqa: E731
    tile_of = lambda i, visit, j, metadata: (metadata[2][visit], i)  # noqa: E731
    weight_of = lambda i, visit, j, metadata: (0, metadata[2][visit])  # noqa: E731
    sums_of = lambda i, visit, j, metadata: (i, 0, metadata[2][visit])  # noqa: E731
    depth = (lambda i, j: (i, j)) if transposed else (lambda i, j: (j, i))
    expert_of = lambda i, visit, j, metadata: (metadata[1][visit], *depth(i, j))  # noqa: E731
    tile = pl.BlockSpec((tm, tn), tile_of)
    weight_tiles = [pl.BlockSpec((1, tm), weight_of)] * (row_weight is not None)
    sums = jax.ShapeDtypeStruct((n_n, 1, m + -m % tm), jnp.float32)

    def run(rows, weights, sizes, row_weight, *beside, interpret=False):
        rows, *beside = (padded(a, tm) for a in (rows, *beside))
        if row_weight is not None:
            beside.append(padded(row_weight[:, None], tm).T)
        metadata, n_visits = make_group_metadata(
            group_sizes=sizes,
            m=rows.shape[0],
            tm=tm,
            start_group=jnp.zeros((), jnp.int32),
            num_nonzero_groups=n_experts,
            visit_empty_groups=False,
        )
        shape = jax.ShapeDtypeStruct((rows.shape[0], n), rows.dtype)
        return pl.pallas_call(
            kernel,
            name=name,
            out_shape=[shape] * n_out + [sums] * has_sums,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(n_n, n_visits, n_k),
                in_specs=[
                    pl.BlockSpec((tm, tk), rows_of),
                    pl.BlockSpec((None, *((tn, tk) if transposed else (tk, tn))), expert_of),
                    *[tile] * (len(beside) - len(weight_tiles)),
                    *weight_tiles,
                ],
                out_specs=[tile] * n_out + [pl.BlockSpec((None, 1, tm), sums_of)] * has_sums,
                scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * m * k * n,
                transcendentals=m * n if weight_tiles else 0,
                bytes_accessed=rows.nbytes
                + weights.nbytes
                + sum(a.nbytes for a in beside)
                + n_out * shape.size * rows.dtype.itemsize,
            ),
            interpret=interpret,
        )(metadata, rows, weights, *beside)

    operands = rows, weights, group_sizes_of(groups), row_weight, *beside
    outs = jax.lax.platform_dependent(*operands, tpu=run, cpu=partial(run, interpret=True))
    return [*(out[:m] for out in outs[:n_out]), *(out.sum((0, 1))[:m] for out in outs[n_out:])]


def _masked(block, axis, size):
    """Sets elements of a block with an index of at least `size` along an axis to zero."""
    index = jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(index < size, block.astype(jnp.float32), 0).astype(block.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def megablox_swiglu(rows, gate, row_weight, w_up, w_down, groups, kept):
    """`(weight SiLU(gate) * (rows W_up)) W_down` of each row: `[M, d]`; zero for rows of no expert,
    but undefined with `PaddedGroups`.

    `rows [M, d]`, `gate [M, f]`, `w_up [E, d, f]` and `w_down [E, f, d]` have one dtype, bfloat16
    or float32; `row_weight [M]` is float32. `kept` is the name of `rows W_up` for the policies of
    `jax.checkpoint`; None: the backward pass computes `rows W_up` again.
    """
    (hidden,) = _product("swiglu", _hidden, rows, w_up, [gate], groups, 1, row_weight)
    return megablox.megablox_matmul(hidden, w_down, groups)


def _forward(rows, gate, row_weight, w_up, w_down, groups, kept):
    n_out = 2 if kept else 1
    hidden, *up = _product("swiglu", _hidden, rows, w_up, [gate], groups, n_out, row_weight)
    y = megablox.megablox_matmul(hidden, w_down, groups)
    up = checkpoint_name(up[0], kept) if kept else None
    return y, (rows, gate, row_weight, up, w_up, w_down, groups)


def _backward(kept, residuals, g):
    rows, gate, row_weight, up, w_up, w_down, groups = residuals
    if up is None:
        up = megablox.megablox_matmul(rows, w_up, groups)
    arguments = "swiglu_backward", _derivative, g, w_down, [gate, up], groups
    d_gate, d_up, hidden, d_weight = _product(*arguments, 3, row_weight, transposed=True)
    d_rows, d_w_up = megablox.gradients(rows, w_up, groups, d_up)
    d_w_down = megablox.weight_gradients(hidden, g, groups, w_down.shape[0])
    d_gate, d_weight = (zero_results(a, groups) for a in (d_gate, d_weight[:, None]))
    return d_rows, d_gate, d_weight[:, 0].astype(row_weight.dtype), d_w_up, d_w_down, None


megablox_swiglu.defvjp(_forward, _backward)


@jax.custom_vjp
def matmul_and_rows(rows, weights, groups):
    """`(megablox_matmul(rows, weights, groups), rows)`. If later products with the same `groups`
    use the returned rows, the kernel for the gradient of `rows` adds theirs, which saves a pass.
    """
    return megablox.megablox_matmul(rows, weights, groups), rows


def _add_gradients(residuals, gradients):
    (rows, weights, groups), (g, d_rows) = residuals, gradients
    arguments = "gmm_add", lambda total, other: [total + other], g, weights, [d_rows], groups, 1
    (d_rows,) = _product(*arguments, transposed=True)
    d_weights = megablox.weight_gradients(rows, g, groups, len(weights))
    return zero_results(d_rows, groups), d_weights, None


# A call of `matmul_and_rows` in the forward rule would make autodiff keep `rows` twice.
matmul_and_rows.defvjp(
    lambda *args: ((megablox.megablox_matmul(*args), args[0]), args), _add_gradients
)

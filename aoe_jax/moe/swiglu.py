"""Computes SwiGLU experts with `grouped_matmul`: rows in expert order, no routing or collectives.

    E_i(x) = (SiLU(gate_i(x)) * (x W_up_i)) W_down_i

where `gate_i(x)` is `x W_gate_i`, or with a factorised gate `(x W_gate_down_i) W_gate_up_i`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.moe.grouped_matmul import grouped_matmul, is_megablox
from aoe_jax.sharding import target_device

# `model.remat="experts"` keeps arrays of this name for the backward pass: `x W_up`, and `x W_gate`
# or AoE's low-rank activation, of each row. Everything else from dispatch to combine is recomputed.
KEPT_EXPERTS = "experts"


def gate_pre_activations(rows, groups, w, code=None, backend="auto"):
    """The gate projection before SiLU: rows `[R, d]` -> `(gate [R, f], code [R, r], rows)`.

    `code` is the low-rank activation of a factorised gate, computed here if the argument is None.
    For a whole gate None is returned. `groups` and `backend` are arguments of `grouped_matmul`. `w`
    contains `w_gate [n, d, f]`, or AoE's `w_gate_down [n, d, r]` and `w_gate_up [n, r, f]`. Use
    the returned rows in later products with the same `groups`: a kernel may add the gradients.
    """
    if "w_gate" in w:
        gate, rows = _product_and_rows(rows, w["w_gate"], groups, backend)
        return checkpoint_name(gate, KEPT_EXPERTS), None, rows
    if code is None:
        code, rows = _product_and_rows(rows, w["w_gate_down"], groups, backend)
        code = checkpoint_name(code, KEPT_EXPERTS)
    return grouped_matmul(code, w["w_gate_up"], groups, backend=backend), code, rows


def _product_and_rows(rows, weights, groups, backend):
    if is_megablox(rows, weights, groups, backend):
        from aoe_jax.moe.grouped_matmul.megablox_swiglu import matmul_and_rows  # imports Pallas

        return matmul_and_rows(rows, weights, groups)
    return grouped_matmul(rows, weights, groups, backend=backend), rows


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def first_neurons(gate, count):
    """`(gate, gate[:, :count])`; autodiff would pad the slice's gradient to the whole width."""
    return gate, gate[:, :count]


first_neurons.defvjp(
    lambda gate, count: (first_neurons(gate, count), None),
    lambda count, _, g: (g[0].at[:, :count].add(g[1]),),
)


def swiglu(rows, gate, row_weight, groups, w, backend="auto", keeps_up=True):
    """`(weight SiLU(gate) * (x W_up)) W_down` of each row: `[R, d]`; zero for rows of no expert,
    but undefined with `PaddedGroups`.

    `row_weight [R]`, float32, is the weight of a row's expert in the output of its token. It is
    applied before `W_down`, so that its gradient needs no output of an expert. `rows [R, d]` and
    `gate [R, f]` are in expert order; `groups` and `backend` are arguments of `grouped_matmul`.
    `keeps_up` says whether Megablox keeps `x W_up` for the backward pass or computes it again.
    """
    if is_megablox(rows, w["w_up"], groups, backend):
        from aoe_jax.moe.grouped_matmul.megablox_swiglu import megablox_swiglu  # imports Pallas

        kept = KEPT_EXPERTS if keeps_up else None
        return megablox_swiglu(rows, gate, row_weight, w["w_up"], w["w_down"], groups, kept)
    product = partial(grouped_matmul, backend=backend)
    up = checkpoint_name(product(rows, w["w_up"], groups), KEPT_EXPERTS)
    return product(weighted_product(gate, up, row_weight), w["w_down"], groups)


def single_expert(x, w):
    """Computes one expert, or several, each on its own tokens: `x [..., T, d]` -> `[..., T, d]`.

    The matrices `w` have the dtype and the leading axes of `x`.
    """
    if "w_gate" in w:
        gate = checkpoint_name(x @ w["w_gate"], KEPT_EXPERTS)
    else:
        gate = checkpoint_name(x @ w["w_gate_down"], KEPT_EXPERTS) @ w["w_gate_up"]
    up = checkpoint_name(x @ w["w_up"], KEPT_EXPERTS)
    width = up.shape[-1]
    ones = jnp.ones(up.size // width)
    hidden = weighted_product(gate.reshape(-1, width), up.reshape(-1, width), ones)
    return hidden.reshape(up.shape) @ w["w_down"]


@jax.custom_vjp
def weighted_product(gate, up, weight):
    """`weight SiLU(gate) * up`: `[R, f]`, `[R, f]`, `[R]` -> `[R, f]` in the dtype of `up`,
    computed in float32 at least.

    The derivative keeps only the arguments; autodiff would keep all intermediate results. With
    float32 throughout and `optimization_barrier`, XLA for TPU computes the derivative and the
    recomputed product in one loop; otherwise it needs two loops that each load all arrays.
    """
    gate, wide_up, weight = _widened(gate, up, weight)
    return (jax.nn.silu(gate) * wide_up * weight).astype(up.dtype)


def _weighted_product_backward(args, g):
    gate, up, weight, g = _widened(*args, g)
    # On GPU the sigmoid has the gate's own dtype, because XLA would store float32 exponentials.
    narrow = args[0] if target_device().platform == "gpu" else gate
    sigmoid = jax.nn.sigmoid(narrow).astype(gate.dtype)
    silu = gate * sigmoid
    d_silu = sigmoid + silu * (1 - sigmoid)
    d_args = g * weight * up * d_silu, g * weight * silu, (g * (silu * up)).sum(axis=1)
    d_args = tuple(d.astype(a.dtype) for d, a in zip(d_args, args, strict=True))
    return jax.lax.optimization_barrier(d_args)


def _widened(gate, up, weight, *more):
    dtype = jnp.promote_types(up.dtype, jnp.float32)
    return [a.astype(dtype) for a in (gate, up, weight[:, None], *more)]


weighted_product.defvjp(lambda *args: (weighted_product(*args), args), _weighted_product_backward)

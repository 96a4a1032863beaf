"""Scores: one number per token and expert, `[T, n]` float32; the higher, the better the expert
suits the token. AoE takes the norm of an expert's own low-rank activation, a router its logit.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

FEW_TOKENS = 8
# Rematerialisation keeps what bears this name: recomputing a top-k may break ties the other way.
# The scores bear it too, since they are only [T, n] and cost a matmul to compute again.
KEPT_ROUTING = "routing"


class Scores(NamedTuple):
    """The scores of a layer's tokens."""

    values: jax.Array  # [T, n] float32 at least
    # [ceil(T / stride), n], the scores of every stride-th token, with the gradient of the balance
    # losses; stride is `BalanceConfig.aux_stride`.
    for_balance: jax.Array
    code: jax.Array | None = None  # [T, n, r], AoE's low-rank activations, if experts use them

    @classmethod
    def of(cls, values, stride, code=None):
        """Scores that have their gradient themselves; they are kept, see `KEPT_ROUTING`."""
        kept = checkpoint_name(values, KEPT_ROUTING)
        return cls(kept, checkpoint_name(values[::stride], KEPT_ROUTING), code)


def aoe_scores(x, weights, layer, ctx):
    """AoE's norms (Algorithm 2, Eq. 4) of tokens `x [T, d]`, as `Scores`.

    Where the weights of experts depend on the chosen norms alone (`layer.sparse_scoring`), the
    norms have no gradient here: those of the chosen experts are computed again with their rows.
    Otherwise the activations of all experts are kept, as published, on one device; over a mesh the
    rows are elsewhere and compute theirs again.
    """
    w, devices, stride = weights["w_gate_down"], ctx.devices, layer.balance.aux_stride
    if layer.sparse_scoring:
        if not layer.balance.has_loss:
            x, w = jax.lax.stop_gradient((x, w))
        both = devices.score(partial(sparse_scores, stride=stride), x, w)
        return Scores(*(checkpoint_name(scores, KEPT_ROUTING) for scores in both))
    if not layer.keeps_code(devices):
        (values,) = devices.score(lambda x, w: (norms(x, w),), x, w)
        return Scores.of(values, stride)

    def activations(x, w):
        whole = devices.gather_weight(layer.parameters["w_gate_down"], w, x.dtype)
        return low_rank_activations(x, whole)

    code = devices.without_whole_weights(activations)(x, w)
    return Scores.of(activation_norms(code), stride, code)


def router_scores(x, weights, layer, ctx):
    """The logits of a router for tokens `x [T, d]` (Algorithm 1), as `Scores`."""
    if "w_router_hidden" in weights:
        logits = large_router_logits(x, weights["w_router_hidden"], weights["w_router"])
    else:
        logits = router_logits(x, weights["w_router"])
    return Scores.of(logits, layer.balance.aux_stride)


def low_rank_activations(x, w_gate_down):
    """AoE's activation cache `C = x [W_gate_down_1 ... W_gate_down_n]` (Eq. 4), as one matmul.

    For the one matmul XLA copies `w_gate_down` with d in front. That copy costs more than it saves
    for fewer than `FEW_TOKENS` tokens, so these take one matmul per expert.

    Args:
      x: `[T, d]`.
      w_gate_down: `[n, d, r]`, same dtype as `x`.

    Returns:
      `[T, n, r]`, dtype of `x`.
    """
    if x.shape[0] < FEW_TOKENS:
        copies = jnp.broadcast_to(x, (w_gate_down.shape[0], *x.shape))
        return jnp.einsum("ntd,ndr->ntr", copies, w_gate_down).swapaxes(0, 1)
    return jnp.einsum("td,ndr->tnr", x, w_gate_down)


@jax.custom_vjp
def activation_norms(c):
    """L2 norms over the last axis, float32 at least: `[..., r]` -> `[...]`; the gradient at a zero
    vector is zero.

    The custom derivative keeps `c` in its own dtype for the backward pass; autodiff would keep a
    float32 copy.
    """
    c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(c * c, axis=-1))


def _norms_forward(c):
    result = activation_norms(c)
    return result, (c, result)


def _norms_backward(residuals, g):
    c, norm = residuals
    scale = jnp.where(norm > 0, g / jnp.where(norm > 0, norm, 1), 0)
    return ((c.astype(scale.dtype) * scale[..., None]).astype(c.dtype),)


activation_norms.defvjp(_norms_forward, _norms_backward)


def safe_root(square):
    """The square root of sums of squares, `[...]` -> `[...]`; its gradient at zero is zero."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def norms(x, w_gate_down):
    """The norms of all experts: `x [T, d]`, `w_gate_down [n, d, r]` of any dtype -> `[T, n]`."""
    return activation_norms(low_rank_activations(x, w_gate_down.astype(x.dtype)))


def sparse_scores(x, w_gate_down, stride):
    """The norms of all experts without a gradient, and of every `stride`-th token with one.

    No cache is kept: what the balance losses need of it is computed again in the backward pass.

    Args:
      x: `[T, d]`.
      w_gate_down: `[n, d, r]`, cast to the dtype of `x`.
      stride: a whole number from 1, over the flattened batch. Where it divides the sequence length,
        the same positions of every sequence take part.

    Returns:
      `(values [T, n], for_balance [ceil(T / stride), n])`, float32 at least.
    """
    values, for_balance = _sparse_scores(x, w_gate_down, stride)
    return jax.lax.stop_gradient(values), for_balance


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sparse_scores(x, w_gate_down, stride):
    values = norms(x, w_gate_down)
    return values, values[::stride]


def _sparse_scores_forward(x, w_gate_down, stride):
    return _sparse_scores(x, w_gate_down, stride), (x[::stride], w_gate_down)


def _sparse_scores_backward(stride, residuals, g):
    x, w_gate_down = residuals
    _, pull_back = jax.vjp(norms, x, w_gate_down)
    d_x, d_w = pull_back(g[1])
    after = g[0].shape[0] - 1 - (x.shape[0] - 1) * stride
    padding = [(0, after, stride - 1), (0, 0, 0)]
    return jax.lax.pad(d_x, jnp.zeros((), d_x.dtype), padding), d_w


_sparse_scores.defvjp(_sparse_scores_forward, _sparse_scores_backward)


def router_logits(x, w_router):
    """Router logits `x W_router`, float32 at least: `x [T, d]`, `w_router [d, n]` -> `[T, n]`."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(dtype), w_router.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def large_router_logits(x, w_hidden, w_router):
    """Logits of the "large router" ablation (Table 2, row 4): `SiLU(x W_hidden) W_router`.

    The paper gives only the parameter count, about `n r d`; one hidden layer is this project's
    reading. `x [T, d]`, `w_hidden [d, m]`, `w_router [m, n]` -> `[T, n]` float32 at least.
    """
    return router_logits(jax.nn.silu(router_logits(x, w_hidden)), w_router)

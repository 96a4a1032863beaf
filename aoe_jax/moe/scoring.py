"""Scores: one number per token and expert, `[T, n]` float32. The router prefers high scores.

With a router the score is its logit. With AoE it is the norm (or the largest value) of the expert's
code: the low-rank activation of a factorised gate (Eq. 4, `x W_gate_down`), or the first s
pre-activations of a whole gate (`x W_gate[:, :s]`). `w_score [n, d, r]` maps a token to all codes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.parameters import EXPERTS

FEW_TOKENS = 8
# Rematerialisation keeps arrays with this name, because a recomputed top-k may break ties
# differently. Scores have the name too: they are only [T, n], and recomputing them costs a matmul.
KEPT_ROUTING = "routing"


class Scores(NamedTuple):
    """The scores of a layer's tokens."""

    values: jax.Array  # [T, n] float32 at least
    # [ceil(T / stride), n], the scores of every stride-th token, through which balance losses
    # have a gradient; stride is `BalanceConfig.aux_stride`.
    for_balance: jax.Array
    code: jax.Array | None = None  # [T, n, r], the codes of all experts; None: not kept

    @classmethod
    def of(cls, values, stride, code=None):
        """Scores with a gradient; rematerialisation keeps them by the name `KEPT_ROUTING`."""
        kept = checkpoint_name(values, KEPT_ROUTING)
        return cls(kept, checkpoint_name(values[::stride], KEPT_ROUTING), code)


def aoe_scores(x, w, layer, devices, keeps_code):
    """AoE's `Scores` (Algorithm 2, Eq. 4) of tokens `x [T, d]`; `w` is `w_score`.

    With `layer.sparse_scoring`, `values` have no gradient here: `apply_experts` computes the scores
    of the chosen experts again, with a gradient. Otherwise, with `keeps_code`, the codes of all
    experts are kept (the paper). Without `keeps_code` the code of each row is computed again.
    """
    score, stride = SCORE_OF_CODE[layer.experts.score], layer.balance.aux_stride
    if layer.sparse_scoring:
        if not layer.balance.has_loss:
            x, w = jax.lax.stop_gradient((x, w))
        both = devices.score(partial(sparse_scores, score=score, stride=stride), x, w)
        return Scores(*(checkpoint_name(scores, KEPT_ROUTING) for scores in both))
    if not keeps_code:
        (values,) = devices.score(lambda x, w: (scores_of_all(x, w, score),), x, w)
        return Scores.of(values, stride)

    def codes(x, w):
        w = devices.gather_weight(EXPERTS["w_gate_down"], w, x.dtype)
        exact = codes_of_all(x, w, jnp.promote_types(x.dtype, jnp.float32))
        return exact.astype(x.dtype), jax.lax.stop_gradient(score(exact))

    # The values are those of float32 codes; the gradient keeps only the rounded codes.
    code, exact = devices.without_whole_weights(codes)(x, w)
    rounded = score(code)
    return Scores.of(rounded + jax.lax.stop_gradient(exact - rounded), stride, code)


def score_columns(weights, experts, devices):
    """`w_score [n, d, r]` of this device's experts. The tensor axis splits a whole gate by columns;
    the first device along it stores the scoring columns and broadcasts them.
    """
    if experts.low_rank:
        return weights["w_gate_down"]
    return devices.from_first(weights["w_gate"][..., : experts.score_neurons])


def router_scores(x, weights, stride):
    """The `Scores` of a router for tokens `x [T, d]`: its logits (Algorithm 1).

    The "large router" ablation (Table 2, row 4) computes `SiLU(x W_hidden) W_router`. The paper
    states only its parameter count, about `n r d`; one hidden layer is this project's choice.
    """
    if "w_router_hidden" in weights:
        x = jax.nn.silu(router_logits(x, weights["w_router_hidden"]))
    return Scores.of(router_logits(x, weights["w_router"]), stride)


def codes_of_all(x, w_score, dtype=None):
    """AoE's activation cache `C = x [W_1 ... W_n]` (Eq. 4), as one matmul.

    `x [T, d]`, `w_score [n, d, r]` -> `[T, n, r]` in `dtype` (None: the dtype of both inputs).

    XLA copies `w_score` with d as the first axis for this matmul. For fewer than `FEW_TOKENS`
    tokens the copy costs more than it saves, so each expert has its own matmul.
    """
    product = partial(jnp.einsum, preferred_element_type=dtype)
    if x.shape[0] < FEW_TOKENS:
        copies = jnp.broadcast_to(x, (w_score.shape[0], *x.shape))
        return product("ntd,ndr->ntr", copies, w_score).swapaxes(0, 1)
    return product("td,ndr->tnr", x, w_score)


@jax.custom_vjp
def activation_norms(c):
    """L2 norms, float32 at least: `[..., r]` -> `[...]`; the gradient at a zero vector is zero.

    The derivative keeps `c` in its own dtype; autodiff would keep a float32 copy.
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


def largest(c):
    """The largest activation, float32 at least: `[..., r]` -> `[...]`."""
    return c.astype(jnp.promote_types(c.dtype, jnp.float32)).max(axis=-1)


# Functions from a code to its score, by `ExpertsConfig.score`.
SCORE_OF_CODE = {"norm": activation_norms, "max": largest}


def scores_of_all(x, w_score, score=activation_norms):
    """The scores of all experts: `x [T, d]`, `w_score [n, d, r]` of any dtype -> `[T, n]`."""
    # With codes in bfloat16, norms choose other experts than in float32 more often, and the largest
    # activations of two experts are often equal; ties favour the lower expert.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return score(codes_of_all(x, w_score.astype(x.dtype), dtype))


def sparse_scores(x, w_score, score, stride):
    """The scores of all tokens (without a gradient) and of every `stride`-th token (with one).

    `x [T, d]`, `w_score [n, d, r]` -> `(values [T, n], for_balance [ceil(T / stride), n])`, float32
    at least. No code is kept; the backward pass computes codes for the balance losses again. If
    `stride` divides the sequence length, the same positions of every sequence have a gradient.
    """
    values, for_balance = _sparse_scores(x, w_score, score, stride)
    return jax.lax.stop_gradient(values), for_balance


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sparse_scores(x, w_score, score, stride):
    values = scores_of_all(x, w_score, score)
    return values, values[::stride]


def _sparse_scores_forward(x, w_score, score, stride):
    return _sparse_scores(x, w_score, score, stride), (x[::stride], w_score)


def _sparse_scores_backward(score, stride, residuals, g):
    _, pull_back = jax.vjp(partial(scores_of_all, score=score), *residuals)
    d_x, d_w = pull_back(g[1])
    after = g[0].shape[0] - 1 - (residuals[0].shape[0] - 1) * stride
    padding = [(0, after, stride - 1), (0, 0, 0)]
    return jax.lax.pad(d_x, jnp.zeros((), d_x.dtype), padding), d_w


_sparse_scores.defvjp(_sparse_scores_forward, _sparse_scores_backward)


def router_logits(x, w_router):
    """Router logits `x W_router`, float32 at least: `x [T, d]`, `w_router [d, n]` -> `[T, n]`.

    The factors have the dtype of `x`: in bfloat16 a TPU needs one pass, in float32 six. In bfloat16
    the gradient of `w_router` has such factors too, as those of all other weights.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == dtype else None
    w_router = w_router.astype(x.dtype)
    return jnp.matmul(x, w_router, precision=precision, preferred_element_type=dtype)

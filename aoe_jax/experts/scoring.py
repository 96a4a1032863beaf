"""The score station: one number per token and expert, `[T, n]` float32, the higher the better the
expert knows the token.

T tokens, d model width, n experts, r low rank (d_low), h hidden width of the large router, s stride
of the balance losses.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

FEW_TOKENS = 8


def low_rank_activations(x, w_down):
    """The activation cache `C = x [Wdown_1 ... Wdown_n]` (Eq. 4) as ONE matmul; of few tokens, as
    one for each expert.

    For the one matmul XLA brings d to the front of `w_down`, a copy of it that few tokens aren't
    worth.

    Args:
      x: `[T, d]`.
      w_down: `[n, d, r]`, same dtype as `x`.

    Returns:
      `[T, n, r]`, dtype of `x`.
    """
    if x.shape[0] < FEW_TOKENS:
        each = jnp.broadcast_to(x, (w_down.shape[0], *x.shape))
        return jnp.einsum("ntd,ndr->ntr", each, w_down).swapaxes(0, 1)
    return jnp.einsum("td,ndr->tnr", x, w_down)


@jax.custom_vjp
def activation_norms(c):
    """L2 norms over the last axis, in float32 at least: `[T, n, r] -> [T, n]`; the gradient at a
    zero vector is zero.

    The custom derivative keeps `c` in its own dtype for the backward pass, where autodiff would
    keep a float32 copy.
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
    """Square roots, whose gradient at zero is zero: of sums of squares, `[...]` -> `[...]`."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def sparse_scores(x, w_down, stride):
    """The norms of all experts without a gradient, and with one for every `stride`-th token; no
    cache is kept.

    Where weights depend on the chosen norms alone, this and computing those again is Algorithm 2,
    values and gradients. The balance losses, which send a gradient to every norm, take it through
    the second result: what they need of the cache is computed again in the backward pass.

    Args:
      x: `[T, d]`.
      w_down: `[n, d, r]`, cast to the dtype of `x`.
      stride: a whole number from 1. Tokens are counted over the flattened batch: where it divides
        the sequence length, the same positions take part in every sequence.

    Returns:
      `(scores [T, n], balance_scores [ceil(T / stride), n])`, float32 at least.
    """
    scores, balance_scores = _sparse_scores(x, w_down, stride)
    return jax.lax.stop_gradient(scores), balance_scores


def norms(x, w_down):
    """The norms of all experts (Eq. 4): `x [T, d]`, `w_down [n, d, r]` of any dtype -> `[T, n]`."""
    return activation_norms(low_rank_activations(x, w_down.astype(x.dtype)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sparse_scores(x, w_down, stride):
    scores = norms(x, w_down)
    return scores, scores[::stride]


def _sparse_scores_backward(stride, residuals, g):
    x, w_down = residuals
    _, pull_back = jax.vjp(norms, x, w_down)
    d_x, d_w_down = pull_back(g[1])
    after = g[0].shape[0] - 1 - (x.shape[0] - 1) * stride
    return jax.lax.pad(d_x, jnp.zeros((), d_x.dtype), [(0, after, stride - 1), (0, 0, 0)]), d_w_down


_sparse_scores.defvjp(
    lambda x, w_down, stride: (_sparse_scores(x, w_down, stride), (x[::stride], w_down)),
    _sparse_scores_backward,
)


def router_logits(x, w_router):
    """Router logits `x R` in float32 at least: `x [T, d]`, `w_router [d, n]` -> `[T, n]`."""
    return _matmul_float32(x, w_router)


def router_cosines(x, w_router):
    """The cosines of tokens and router columns: `x [T, d]`, `w_router [d, n]` -> `[T, n]`, 0 where
    either is zero.
    """
    return _by_lengths(router_logits(x, w_router), x, activation_norms(w_router.T))


def relative_norms(norms, x, w_down_norms):
    """Norms by what they would be for a random direction: `||x Wd_i|| sqrt(d) / (||x|| ||Wd_i||) -
    1`.

    Neither the length of a token nor that of an expert's weights counts. At initialisation they lie
    around 0, with a standard deviation of `1 / sqrt(2 r)` over experts.

    Args:
      norms: `[T, n]` float32, of `x Wd_i`.
      x: `[T, d]`.
      w_down_norms: `[n]` float32, the Frobenius norms of the `Wd_i`.

    Returns:
      `[T, n]` float32; -1 where token or weights are zero.
    """
    return math.sqrt(x.shape[1]) * _by_lengths(norms, x, w_down_norms) - 1


def _by_lengths(scores, x, weight_norms):
    """`scores [T, n]` by the lengths of tokens `x [T, d]` and of weights `[n]`; 0 where a length
    is.
    """
    lengths = activation_norms(x)[:, None] * weight_norms
    return jnp.where(lengths > 0, scores / jnp.where(lengths > 0, lengths, 1), 0)


def large_router_logits(x, w_hidden, w_router):
    """Logits of the "large router" ablation (Table 2, row 4): `SiLU(x W1) W2`, a router with about
    `n r d` parameters.

    The paper gives the parameter count only; one hidden layer is this project's reading of it.
    `x [T, d]`, `w_hidden [d, h]`, `w_router [h, n]` -> `[T, n]` float32.
    """
    return _matmul_float32(jax.nn.silu(_matmul_float32(x, w_hidden)), w_router)


def _matmul_float32(x, w):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(dtype), w.astype(dtype), precision=jax.lax.Precision.HIGHEST)

"""The score station: one number per token and expert, `[T, n]` float32, the higher the better the expert knows the token.

T tokens, d model width, n experts, r low rank (d_low), h hidden width of the large router.
"""

import jax
import jax.numpy as jnp


def low_rank_activations(x, w_down):
    """The activation cache `C = x [Wdown_1 ... Wdown_n]` (Eq. 4) as ONE matmul.

    Args:
      x: `[T, d]`.
      w_down: `[n, d, r]`, same dtype as `x`.

    Returns:
      `[T, n, r]`, dtype of `x`.
    """
    return jnp.einsum("td,ndr->tnr", x, w_down)


@jax.custom_vjp
def activation_norms(c):
    """L2 norms over the last axis, in float32 at least: `[T, n, r] -> [T, n]`; the gradient at a zero vector is zero.

    The custom derivative keeps `c` in its own dtype for the backward pass, where autodiff would keep a float32 copy.
    """
    c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(c * c, axis=-1))


def _norms_forward(c):
    norms = activation_norms(c)
    return norms, (c, norms)


def _norms_backward(residuals, g):
    c, norms = residuals
    scale = jnp.where(norms > 0, g / jnp.where(norms > 0, norms, 1), 0)
    return ((c.astype(scale.dtype) * scale[..., None]).astype(c.dtype),)


activation_norms.defvjp(_norms_forward, _norms_backward)


def router_logits(x, w_router):
    """Router logits `x R` in float32 at least: `x [T, d]`, `w_router [d, n]` -> `[T, n]`."""
    return _matmul_float32(x, w_router)


def large_router_logits(x, w_hidden, w_router):
    """Logits of the "large router" ablation (Table 2, row 4): `SiLU(x W1) W2`, a router with about `n r d` parameters.

    The paper gives the parameter count only; one hidden layer is this project's reading of it.
    `x [T, d]`, `w_hidden [d, h]`, `w_router [h, n]` -> `[T, n]` float32.
    """
    return _matmul_float32(jax.nn.silu(_matmul_float32(x, w_hidden)), w_router)


def _matmul_float32(x, w):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(dtype), w.astype(dtype), precision=jax.lax.Precision.HIGHEST)

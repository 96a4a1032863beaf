"""The experts station: SwiGLU on rows by expert, through one `grouped_matmul`. It knows no method
and no mesh.

P rows, d model width, n experts, w expert width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.grouped_matmul import grouped_matmul

# What `model.remat="experts"` keeps for the backward pass bears this name: per row `x Wp_i`, and of
# the gate `C_i` (AoE) or `x Wg_i`. All else between dispatch and combine is computed again from it.
EXPERT_RESIDUAL = "expert_residual"


def swiglu(rows, gate, weight, w_p, w_o, groups):
    """`weight (SiLU(gate) * (x Wp_i)) Wo_i` for each row.

    The weight is applied inside, so that its gradient needs no expert's output: none is kept or
    computed again.

    Args:
      rows: `[P, d]`.
      gate: pre-activations `[P, w]`: `x Wg_i` of a traditional expert, `C_i Wup_i` of an AoE
        expert.
      weight: `[P]` float32, of the expert in the token's output.
      w_p: `[n, d, w]`. w_o: `[n, w, d]`.
      groups: the rows of each expert, as `grouped_matmul` takes them.

    Returns:
      `[P, d]`; rows of no expert are zero.
    """
    up = checkpoint_name(grouped_matmul(rows, w_p, groups), EXPERT_RESIDUAL)
    return grouped_matmul(weighted_product(gate, up, weight), w_o, groups)


def one_expert(x, w):
    """`(SiLU(gate) * (x Wp)) Wo` of one expert, or of several, each on tokens of its own.

    Args:
      x: `[..., T, d]`.
      w: matrices of the dtype of `x`, with the same axes before their last two: `w_p`, `w_o`, and
        of the gate `w_g` or, of an AoE expert, `w_down` and `w_up`.

    Returns:
      `[..., T, d]`.
    """
    if "w_down" in w:
        gate = checkpoint_name(x @ w["w_down"], EXPERT_RESIDUAL) @ w["w_up"]
    else:
        gate = checkpoint_name(x @ w["w_g"], EXPERT_RESIDUAL)
    up = checkpoint_name(x @ w["w_p"], EXPERT_RESIDUAL)
    width = up.shape[-1]
    hidden = weighted_product(
        gate.reshape(-1, width), up.reshape(-1, width), jnp.ones(up.size // width)
    )
    return hidden.reshape(up.shape) @ w["w_o"]


@jax.custom_vjp
def weighted_product(gate, up, weight):
    """`weight SiLU(gate) * up`: `[P, w]`, `[P, w]`, `[P]` -> `[P, w]`, dtype of `up`.

    Autodiff would keep every elementwise step of it for the backward pass; its three arguments
    suffice. `jax.checkpoint` would do, but not within another that keeps all but gathered weights.
    """
    return _weighted_product(gate, up, weight)


def _weighted_product(gate, up, weight):
    return (jax.nn.silu(gate) * up * weight[:, None]).astype(up.dtype)


weighted_product.defvjp(
    lambda *args: (_weighted_product(*args), args),
    lambda args, g: jax.vjp(_weighted_product, *args)[1](g),
)

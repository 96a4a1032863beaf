"""The experts station: SwiGLU on rows in expert order, through one `grouped_matmul`. It knows no method and no mesh.

P rows, d model width, n experts, w expert width.
"""

import jax

from aoe_jax.experts.grouped_matmul import grouped_matmul


def swiglu(rows, gate, w_p, w_o, group_sizes):
    """`(SiLU(gate) * (x Wp_i)) Wo_i` for each row.

    Args:
      rows: `[P, d]`.
      gate: pre-activations `[P, w]`: `x Wg_i` of a traditional expert, `C_i Wup_i` of an AoE expert.
      w_p: `[n, d, w]`. w_o: `[n, w, d]`.
      group_sizes: `[n]` int32.

    Returns:
      `[P, d]`; rows past `sum(group_sizes)` are zero.
    """
    hidden = jax.nn.silu(gate) * grouped_matmul(rows, w_p, group_sizes)
    return grouped_matmul(hidden, w_o, group_sizes)

"""The loss of Expert-Router Coupling, ERC (Lv, Ma, Ma, Qiao, arXiv 2512.23447), for a router MoE.

    R~_i = R_i * delta_i,   delta_i ~ U(1 - eps_i, 1 + eps_i)^d,   eps_i = min over j != i of ||R_i - R_j|| / (2 ||R_i||)
    M_ij = ||R~_i Wg_j||
    L    = 1/n^2 sum over i and j != i of  max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0)

Row R_i of the router stands for the tokens that it sends to expert i. With some noise, which leaves
it nearer to R_i than to any other row, it is to excite its own expert more than others, and its
expert more than other rows do. So a router learns what AoE reads off its experts' activations, at a
cost that no token adds to. eps has no gradient; it flows through R and Wg.

Faithful to the paper's formula and noise. Its weight (`balance.coupling_weight`) is 1 there, and
alpha (`balance.coupling_alpha`) 1, or with 256 experts 0.5. As there, it comes beside the ordinary
balance loss, in training only, and tokens are routed by R without noise. Causal: it knows no token.
This project's: noise is drawn anew for each layer and micro-batch, and sums are in float32, their
products at the platform's default precision for it.

It costs 6 n^2 d f FLOPs a layer and micro-batch, and 2 n^2 d f of its forward pass once more, which
is computed again in the backward pass rather than kept; on every device of a mesh for its own part
of Wg, alike along `data`. Its largest array is `[m, n, f]`.

n experts, m of a device, d model width, f expert width.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aoe_jax.experts.scoring import activation_norms, safe_root


def noise_bounds(rows):
    """eps: how far noise may scale the numbers of each row of the router; `[n, d]` -> `[n]`,
    without a gradient.
    """
    rows = jax.lax.stop_gradient(rows)
    distances = jnp.linalg.norm(rows[:, None] - rows[None], axis=-1)
    nearest = jnp.min(jnp.where(jnp.eye(rows.shape[0], dtype=bool), jnp.inf, distances), axis=1)
    lengths = jnp.linalg.norm(rows, axis=-1)
    return jnp.where(lengths > 0, nearest / (2 * jnp.where(lengths > 0, lengths, 1)), 0)


def with_noise(rows, key):
    """`R~` from the rows R of the router, `[n, d]`."""
    noise = jax.random.uniform(key, rows.shape, rows.dtype, -1, 1)
    return rows * (1 + noise_bounds(rows)[:, None] * noise)


def loss_of_norms(norms, alpha):
    """L from M: `[n, n]` -> `[]`."""
    n = norms.shape[0]
    own = alpha * jnp.diagonal(norms)[:, None]
    above = jax.nn.relu(norms - own) + jax.nn.relu(norms.T - own)
    return jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, above)) / n**2


def coupling_loss(devices, w_router, w_g, alpha, key):
    """The loss of one layer.

    Args:
      devices: `parallel.Devices`.
      w_router: `[d, n]` float32, the same on all devices, whose columns are the rows R.
      w_g: `[m, d, f]` float32, of this device's experts, its piece of d and f.
      alpha: `BalanceConfig.coupling_alpha`.
      key: for the noise, the same on all devices.

    Returns:
      `[]` float32, the same on all devices.
    """
    norms = jax.checkpoint(partial(_norms, devices), prevent_cse=False)
    return loss_of_norms(norms(with_noise(w_router.T, key), w_g), alpha)


def _norms(devices, rows, w_g):
    """M `[n, n]` on all devices."""
    rows = devices.piece(rows, "fsdp", 1)
    # One expert after another: a product with all of them would bring d to the front of w_g, a copy
    # of it.
    activations = devices.total(jax.lax.map(lambda w: rows @ w, w_g), ("fsdp",))
    norms = activation_norms(activations)  # [m, n]
    if devices.size("tensor") > 1:
        norms = safe_root(devices.total(norms**2, ("tensor",)))
    return devices.gather(norms, "expert").T

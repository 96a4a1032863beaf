"""Expert-Router Coupling, ERC (Lv, Ma, Ma, Qiao, arXiv 2512.23447): top-k with a loss that couples
a router's columns to its experts.

    eps_i = min_j ||R_i - R_j|| / (2 ||R_i||)
    R~_i = R_i * delta_i,   delta_i ~ U(1 - eps_i, 1 + eps_i)^d
    a_ij = ||R~_i W_gate_j||
    L    = 1/n^2 sum over i and j != i of  max(a_ij - alpha a_ii, 0) + max(a_ji - alpha a_ii, 0)

Column R_i of the router represents the tokens of expert i. The noise leaves R~_i nearer to R_i than
to any other column. The loss is small if R~_i activates its own expert more than other experts, and
if other columns activate expert i less than R~_i does. The cost does not grow with the number of
tokens. The gradient flows through R and W_gate, not through eps.

The formula, the noise and the weight 1 of the loss are the paper's. The paper's alpha is 1, or 0.5
with 256 experts. As in the paper, the loss is added to the ordinary balance loss, in training only,
and tokens are routed by R without noise. This project draws new noise for each layer and
micro-batch, and computes the sums in float32.

The loss costs 6 n^2 d f FLOPs per layer and micro-batch, plus 2 n^2 d f because the backward pass
recomputes the norms. Every device of a mesh uses its own shard of W_gate; devices along
`data` repeat the same computation. The largest array is `[experts of a device, n, f]`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import FixedK, TopK
from aoe_jax.moe.scoring import activation_norms, safe_root


def with_noise(rows, key):
    """Returns `R~ [n, d]`; `rows [n, d]` are the router's columns R, and eps has no gradient."""
    constant = jax.lax.stop_gradient(rows)
    distances = jnp.linalg.norm(constant[:, None] - constant[None], axis=-1)
    nearest = jnp.min(jnp.where(jnp.eye(len(rows), dtype=bool), jnp.inf, distances), axis=1)
    lengths = jnp.linalg.norm(constant, axis=-1)
    eps = jnp.where(lengths > 0, nearest / (2 * jnp.where(lengths > 0, lengths, 1)), 0)
    return rows * (1 + eps[:, None] * jax.random.uniform(key, rows.shape, rows.dtype, -1, 1))


def coupling_loss(devices, w_router, w_gate, alpha, key):
    """The loss of one layer, `[]` float32, the same on all devices.

    `w_router [d, n]` and the `key` of the noise are the same on all devices; `w_gate [n, d, f]` is
    this device's shard. Both matrices are float32.
    """
    norms = jax.checkpoint(partial(_norms, devices), prevent_cse=False)
    a, n = norms(with_noise(w_router.T, key), w_gate), w_router.shape[1]
    own = alpha * jnp.diagonal(a)[:, None]
    above = jax.nn.relu(a - own) + jax.nn.relu(a.T - own)
    return jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, above)) / n**2


def _norms(devices, rows, w_gate):
    """The norms a_ij of all experts, `[n, n]`, equal on all devices."""
    rows = devices.piece(rows, "fsdp", 1)
    # One product per expert, because a single product would copy W_gate, with d as first axis.
    activations = devices.total(jax.lax.map(lambda w: rows @ w, w_gate), ("fsdp",))
    norms = activation_norms(activations)
    if devices.size("tensor") > 1:
        norms = safe_root(devices.total(norms**2, ("tensor",)))
    return devices.gather(norms, "expert").T


@dataclass(frozen=True)
class ERC(FixedK):
    """Top-k routing with the coupling loss. It supports a selection bias, and it is causal."""

    name = "erc"

    weight: float = setting(1.0, above=0, training_only=True)  # weight of the loss
    # The norms a_ij and a_ji add to the loss only where they are above alpha a_ii.
    alpha: float = setting(1.0, at_least=0, training_only=True)
    norm_topk_prob: bool = True  # weights are a softmax over the chosen scores; False: over all

    def __call__(self, scores, weights, ctx):
        routing = TopK(self.norm_topk_prob)(scores, weights, ctx)
        if not ctx.training:
            return routing
        # The layer computes the loss, so that devices sum its gradient like that of other losses.
        with jax.named_scope("coupling"):
            key = jax.random.fold_in(ctx.key(), 0)
            matrices = weights["w_router"], weights["w_gate"]
            loss = coupling_loss(ctx.devices, *matrices, self.alpha, key)
        return routing._replace(records={"coupling_loss": loss})

    def losses(self, stats, state, weights):
        return {"coupling_loss": (self.weight, stats.records["coupling_loss"].mean())}

    def flops(self, config):
        n, d = config.experts.n_experts, config.model.d_model
        tokens = config.tokens_per_step // config.train.accumulate
        # The loss is computed once per micro-batch.
        return 6 * d * n + 6 * n**2 * d * config.experts.d_ffn / tokens

    def check(self, config):
        e = config.experts
        is_plain = e.kind == "router" and not e.factorised_gate and not e.large_router
        if not is_plain or e.n_experts == 1:
            what = "couples the columns of a plain router (experts.kind='router') with the"
            self.refuse("name", f"{what} whole gates of several experts")

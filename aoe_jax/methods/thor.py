"""`experts.kind="thor"`: THOR (Zuo et al., arXiv 2110.04260). Experts are drawn at random and
trained to agree.

In training every layer draws one expert, uniformly, for all tokens of a micro-batch. A step makes
two forward passes with different draws; both have a gradient. The loss of the predictions p1, p2 is

    L = CE(p1) + CE(p2) + alpha CR,   CR = (KL(p1 || p2) + KL(p2 || p1)) / 2

L is summed over targets and divided by the sum of their weights; alpha is `consistency_weight`. The
reported `nll` is the mean of both passes. There is no router and no balance loss. The load of an
expert in the statistics is 1 / n, the probability that it is drawn.

At inference each layer draws one expert for all tokens (`inference="sequence"`), or one for each
position ("token"). The random key is made of `inference_seed`, the layer index and, for "token",
the position. So draws do not depend on the text, the batch, the mesh or the use of a cache.

The method follows the authors' text and code, except that every layer has experts, not every second
one, and that there is no label smoothing and no dropout. With `experts.factorised_gate` the experts
are AoE's; the AoE paper compares AoE with this random routing.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.checks import setting
from aoe_jax.methods.unchosen import Unchosen
from aoe_jax.model.vocabulary import sums_over_chunks
from aoe_jax.moe.layer import apply_experts, rematerialised
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.moe.routing import Hooks, by_token
from aoe_jax.moe.swiglu import single_expert
from aoe_jax.parameters import matrices_of

PASSES = 2  # forward passes of a training step


def draw_expert(key, n_experts):
    """One expert, uniformly: `[]` int32."""
    return jax.random.randint(key, (), 0, n_experts)


def layer_key(seed, layer_index):
    """The key of a layer's draws at inference."""
    return jax.random.fold_in(jax.random.key(seed), layer_index)


def draw_by_position(key, positions, n_experts):
    """An expert for each position, independent of the other positions: `[T]` -> `[T]` int32."""
    return jax.vmap(lambda i: draw_expert(jax.random.fold_in(key, i), n_experts))(positions)


def drawn(devices, w, expert):
    """The matrix of one expert, from the device that stores it: `w [n, a, b]` -> `[a, b]`."""
    first = devices.rank("expert") * w.shape[0]
    index = jnp.clip(expert - first, 0, w.shape[0] - 1)
    own = jax.lax.dynamic_index_in_dim(w, index, keepdims=False)
    is_here = (expert >= first) & (expert < first + w.shape[0])
    return devices.total(jnp.where(is_here, own, 0), ("expert",))


def consistent_cross_entropy(consistency, hidden, table, targets, weights):
    """The cross-entropy of two passes, and the divergence of their predictions.

    `hidden` has two arrays `[T, d]`, one per pass, and `consistency` is the weight of the
    divergence. The other arguments are those of `cross_entropy`.

    Returns:
      `(loss, nll, divergence)`, weighted sums over tokens: `nll` is the sum over both passes,
      `divergence` is `(KL(p || q) + KL(q || p)) / 2` of their distributions, and `loss` is
      `nll + consistency * divergence`. Only the loss has a gradient.
    """
    of_chunk = partial(_of_two_passes, consistency)
    return tuple(sums_over_chunks(of_chunk, 3, hidden, table, targets, weights))


def _of_two_passes(consistency, logits, targets, weights):
    one_hot = targets[:, None] == jnp.arange(logits[0].shape[1])
    log_p, log_q = (jax.nn.log_softmax(a) for a in logits)
    p, q, difference = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    kl_pq, kl_qp = (p * difference).sum(axis=1), -(q * difference).sum(axis=1)
    nll = jnp.sum(weights * -jnp.where(one_hot, log_p + log_q, 0).sum(axis=1))
    divergence = jnp.sum(weights * (kl_pq + kl_qp) / 2)
    half, weights = consistency / 2, weights[:, None]
    by_p = weights * (p - one_hot + half * (p * (difference - kl_pq[:, None]) + p - q))
    by_q = weights * (q - one_hot + half * (q * (-difference - kl_qp[:, None]) + q - p))
    return [nll + consistency * divergence, nll, divergence], [by_p, by_q]


@dataclass(frozen=True)
class Thor(Unchosen):
    """The THOR layer. The second to last axis of its input is the sequence."""

    name = "thor"

    # alpha: weight of the symmetric KL divergence between the two passes.
    consistency_weight: float = setting(5.0, at_least=0, training_only=True)
    # At inference a layer draws one expert for all tokens (sequence) or for each position (token).
    inference: str = setting("sequence", choices=("sequence", "token"))
    inference_seed: int = setting(0, at_least=0)  # seed of the draws at inference

    def __call__(self, x, weights, layer, ctx):
        n, devices = layer.experts.n_experts, ctx.devices
        with jax.named_scope("route"):
            key = ctx.key() if ctx.training else layer_key(self.inference_seed, ctx.layer_index)
            if not ctx.training and self.inference == "token":
                expert = draw_by_position(key, ctx.positions, n)
                routing = by_token(expert[:, None], jnp.ones((x.shape[0], 1)))
                return apply_experts(x, routing, weights, layer, ctx), _stats_of_draws(n)
            expert = draw_expert(key, n)

        @jax.named_scope("experts")
        def compute(x, weights):
            w = {name: drawn(devices, a, expert) for name, a in weights.items()}
            y = single_expert(devices.gather(x, "tensor"), layer.gathered(w, devices))
            return devices.sum_scatter(y, "tensor")

        return rematerialised(compute, devices)(x, weights), _stats_of_draws(n)

    @property
    def hooks(self):
        return Hooks(training_sums=self._training_sums, passes=PASSES)

    def _training_sums(self, features, key, sum_over_targets):
        hidden, stats = jax.lax.map(features, jax.random.split(key, PASSES))
        function = partial(consistent_cross_entropy, self.consistency_weight)
        loss, nll, divergence = sum_over_targets(tuple(hidden), function)
        stats = jax.tree.map(lambda a: a.mean(axis=0), stats)
        return loss, nll / PASSES, {"divergence": divergence}, stats

    def parameters(self, experts):
        return matrices_of(experts)


def _stats_of_draws(n_experts):
    """The statistics of a random draw: the load is the probability 1 / n, and scores are 0."""
    chance, nothing = jnp.full(n_experts, 1 / n_experts), jnp.zeros(n_experts)
    entropy = jnp.float32(np.log(n_experts))
    return LayerStats(chance, chance, entropy, nothing, jnp.zeros(()))

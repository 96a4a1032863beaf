"""`experts.kind="thor"`: THOR (Zuo et al., arXiv 2110.04260). Experts are drawn at random and
trained to agree.

In training every layer draws one expert, uniformly, for all tokens of a batch (or micro-batch). A
step passes the batch twice, with other draws, and both passes have gradients:

    L = CE(p1) + CE(p2) + alpha CR,   CR = (KL(p1 || p2) + KL(p2 || p1)) / 2

summed over targets and divided by their weight; alpha is `consistency_weight`. There is no router
and no balance loss: the load in the statistics is the chance of the draw, the same for all experts.
The `nll` that is reported is the mean of both passes.

At inference every token (`inference="token"`) or every sequence ("sequence") draws an expert in
each layer, by a key made of `inference_seed`, the number of the layer and, for "token", the
position. So all sequences, batches and meshes have the same draws, decoding has those of a whole
pass, and evaluations can be repeated.

It follows the authors' text and code, except: experts are in every layer rather than every second,
and there is no label smoothing and no dropout. Draws do not depend on scores: with
`experts.factorised_gate` experts are AoE's, and this is the random routing that AoE compares with.
Costs one expert per token, and two passes per training step.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.checks import setting
from aoe_jax.methods.unchosen import Unchosen
from aoe_jax.model.loss import consistent_cross_entropy
from aoe_jax.moe.balance import LayerStats
from aoe_jax.moe.experts import single_expert
from aoe_jax.moe.layer import apply_experts
from aoe_jax.moe.routing import by_token
from aoe_jax.parameters import matrices_of


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
    """The matrix of one expert, on whichever device it is: `w [n, a, b]` -> `[a, b]`."""
    first = devices.rank("expert") * w.shape[0]
    index = jnp.clip(expert - first, 0, w.shape[0] - 1)
    own = jax.lax.dynamic_index_in_dim(w, index, keepdims=False)
    is_here = (expert >= first) & (expert < first + w.shape[0])
    return devices.total(jnp.where(is_here, own, 0), ("expert",))


@dataclass(frozen=True)
class Thor(Unchosen):
    """THOR. A sequence is the tokens along the axis before the last."""

    name = "thor"
    passes = 2

    # alpha: weight of the symmetric KL divergence between the two passes.
    consistency_weight: float = setting(5.0, at_least=0, training_only=True)
    # Whether each sequence or each token draws an expert at inference.
    inference: str = setting("sequence", choices=("sequence", "token"))
    inference_seed: int = setting(0, at_least=0)  # seed of these draws

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
        def experts(x, weights):
            w = {name: drawn(devices, a, expert) for name, a in weights.items()}
            y = single_expert(devices.gather(x, "tensor"), layer.gathered(w, devices))
            return devices.sum_scatter(y, "tensor")

        return layer.rematerialised(experts, devices)(x, weights), _stats_of_draws(n)

    def training_sums(self, features, key, sum_over_targets):
        hidden, stats = jax.lax.map(features, jax.random.split(key, self.passes))
        function = partial(consistent_cross_entropy, self.consistency_weight)
        loss, nll, divergence = sum_over_targets(tuple(hidden), function)
        stats = jax.tree.map(lambda a: a.mean(axis=0), stats)
        return loss, nll / self.passes, {"divergence": divergence}, stats

    def parameters(self, experts):
        return matrices_of(experts)


def _stats_of_draws(n_experts):
    """The statistics of a random draw: its probabilities as load, and no scores."""
    chance, nothing = jnp.full(n_experts, 1 / n_experts), jnp.zeros(n_experts)
    entropy = jnp.float32(np.log(n_experts))
    return LayerStats(chance, chance, entropy, nothing, jnp.zeros(()))

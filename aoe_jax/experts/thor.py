"""THOR (Zuo et al., arXiv 2110.04260): experts are drawn, not chosen, and trained to agree.

In training every layer draws one expert, uniformly and by itself, for all tokens of a batch (with
`train.accumulate`, of a micro-batch). A step passes the batch twice, with other draws, and both
passes have gradients:

    L = CE(p1) + CE(p2) + alpha CR,   CR = (KL(p1 || p2) + KL(p2 || p1)) / 2 = sum (p1 - p2) (log p1 - log p2) / 2

summed over targets and divided by their weight; alpha is `thor.consistency_weight`. There is no
router and no balance loss: the load that statistics report is the chance of the draw, the same for
all experts. What is reported as `nll` is the mean of both passes.

At inference every token (`thor.inference="token"`) or every sequence ("sequence") draws an expert
in each layer. Draws are those of a sequence that is alone and has a generator of a fixed seed: the
key is made of `thor.inference_seed`, the number of the layer and, for "token", the position. So all
sequences draw alike, on every mesh and in every batch, a text goes token by token as at once, and
evaluations can be repeated. Another seed is another draw.

Faithful to the authors' text and code but for: experts in every layer instead of every second, no
label smoothing, and no dropout (which would differ between the passes as well). Draws have nothing
to do with scores: with `experts.factorised_gate` experts are AoE's, whose norms nobody asks, which
is the random routing that AoE compares with. An ensemble of all experts isn't offered. Costs one
expert a token, and two passes a training step.

t tokens of a device, d model width, n experts, m experts of a device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.methods import ThorConfig
from aoe_jax.experts.balance import LayerStats
from aoe_jax.experts.layer import (
    ExpertsModule,
    expert_init,
    expert_shapes,
    low_rank_gate,
    whole_gate,
)
from aoe_jax.experts.selection.assignment import by_token
from aoe_jax.experts.swiglu import one_expert


def draw_expert(key, n_experts):
    """One expert, uniformly: `[]` int32."""
    return jax.random.randint(key, (), 0, n_experts)


def layer_key(seed, number):
    """The key of a layer's draws at inference."""
    return jax.random.fold_in(jax.random.key(seed), number)


def draw_by_position(key, positions, n_experts):
    """An expert for each position, whatever the other positions are: `[t]` int32 -> `[t]` int32."""
    return jax.vmap(lambda position: draw_expert(jax.random.fold_in(key, position), n_experts))(
        positions
    )


def drawn(devices, w, expert):
    """The matrix of one expert, on whichever device of the expert axis it lies: `w [m, a, b]` ->
    `[a, b]`.
    """
    first = devices.expert_rank() * w.shape[0]
    own = jax.lax.dynamic_index_in_dim(
        w, jnp.clip(expert - first, 0, w.shape[0] - 1), keepdims=False
    )
    is_here = (expert >= first) & (expert < first + w.shape[0])
    return devices.total(jnp.where(is_here, own, 0), ("expert",))


class ThorLayer(ExpertsModule):
    """`experts.kind="thor"`; `settings` is a `ThorConfig`. A sequence is the tokens along the axis
    before the last.
    """

    selects = False
    needs_key = True
    needs_place = True
    score_name = "mean_score"  # there is none: zeros
    passes = 2

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        return {name: (expert_init, shape) for name, shape in expert_shapes(self.config, d).items()}

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, None)`."""
        n, settings = self.config.n_experts, self.settings or ThorConfig()
        key = given.key
        with jax.named_scope("select"):
            if key is None:
                key = layer_key(settings.inference_seed, given.number)
                if settings.inference == "token":
                    expert = draw_by_position(key, given.positions, n)
                    assignment = by_token(expert[:, None], jnp.ones((x.shape[0], 1)))
                    gate = low_rank_gate if self.config.low_rank else whole_gate
                    return (
                        self.process_chosen(devices, x, assignment, gate, weights),
                        _stats_of_draws(n),
                        None,
                    )
            expert = draw_expert(key, n)

        @jax.named_scope("experts")
        def experts(x, weights):
            w = {
                name: devices.gather_weight(name, drawn(devices, a, expert), self.dtype)
                for name, a in weights.items()
            }
            return devices.sum_scatter(one_expert(devices.gather(x, "tensor"), w), "tensor")

        return self.rematerialised(devices, experts)(x, weights), _stats_of_draws(n), None


def _stats_of_draws(n_experts):
    """Those of the draw itself, the same for every batch: chances for load, and no scores."""
    chance, nothing = jnp.full(n_experts, 1 / n_experts), jnp.zeros(n_experts)
    return LayerStats(chance, chance, jnp.float32(np.log(n_experts)), nothing, jnp.zeros(()))

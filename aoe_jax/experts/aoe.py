"""`experts.kind="aoe"`: Autonomy-of-Experts.

t tokens of a device, d model width, w expert width.
"""

from functools import partial

import jax

from aoe_jax.experts import dispatch, scoring
from aoe_jax.experts import transport as transports
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.layer import ExpertsModule, expert_init, expert_shapes, low_rank_gate


class AoELayer(ExpertsModule):
    """Autonomy-of-Experts layer (Algorithm 2): experts ranked by the norm of their own low-rank
    activations, no router.
    """

    score_name = "mean_norm"

    @staticmethod
    def in_words(experts):
        """As in every layer."""
        return f"AoE, r={experts.d_low}"

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        return {name: (expert_init, shape) for name, shape in expert_shapes(self.config, d).items()}

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""
        stride, operands, gate = self.balance.aux_stride, (x, weights["w_down"]), low_rank_gate
        with jax.named_scope("score"):
            if self.config.sparse_scoring:
                if not self.balance.has_loss:
                    operands = jax.lax.stop_gradient(operands)
                scores, balance_scores = devices.score(
                    partial(scoring.sparse_scores, stride=stride), *operands
                )
            elif (
                transports.is_local(devices, self.method.all_slots_used)
                and devices.size("tensor") == 1
            ):

                def activations(x, w_down):
                    return scoring.low_rank_activations(
                        x, devices.gather_weight("w_down", w_down, x.dtype)
                    )

                cache = devices.without_whole_weights(activations)(x, weights["w_down"])
                scores = scoring.activation_norms(cache)
                balance_scores = scores[::stride]

                def gate(rows, round, groups, w):
                    c = dispatch.take_activations(cache, *round)
                    return grouped_matmul(c, w["w_up"], groups), None

            else:  # the rows lie where the cache doesn't: their activations are computed again
                (scores,) = devices.score(lambda x, w_down: (scoring.norms(x, w_down),), *operands)
                balance_scores = scores[::stride]
            if self.method.relative_scores:
                scores = scoring.relative_norms(scores, x, devices.matrix_norms(weights["w_down"]))
                balance_scores = scores[::stride]
        return self.pipeline(devices, x, given, scores, balance_scores, gate, weights)

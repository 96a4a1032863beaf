"""`experts.kind="router"`: the traditional mixture of experts.

t tokens of a device, d model width.
"""

import jax

from aoe_jax.experts import coupling, scoring
from aoe_jax.experts.layer import (
    ExpertsModule,
    expert_init,
    expert_shapes,
    low_rank_gate,
    matrix_init,
    whole_gate,
)


class RouterLayer(ExpertsModule):
    """Traditional mixture-of-experts layer (Algorithm 1), with Table 2's ablations: factorised
    gate, large router.

    In training it may have the loss of `experts/coupling.py`, which is one of parameters and is
    computed here: so its gradient joins that of the layer before devices add it up, and needs no
    array of its own.
    """

    for_all_tokens = ("w_router", "w_router_hidden")

    @staticmethod
    def in_words(experts):
        """As in every layer."""
        return "MoE"

    @property
    def needs_key(self):
        """Whether it draws at random in training."""
        return self.balance.coupling_weight > 0

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        c = self.config
        hidden = c.large_router_width(d)
        routers = {"w_router_hidden": (d, hidden), "w_router": (hidden, c.n_experts)}
        if not c.large_router:
            routers = {"w_router": (d, c.n_experts)}
        shapes = expert_shapes(c, d)
        experts = {
            name: shapes.pop(name) for name in ("w_p", "w_o")
        } | shapes  # the order in which they are drawn
        return {name: (matrix_init, shape) for name, shape in routers.items()} | {
            name: (expert_init, shape) for name, shape in experts.items()
        }

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""
        weights = dict(weights)
        w_router = weights.pop("w_router")
        with jax.named_scope("score"):
            if self.config.large_router:
                scores = scoring.large_router_logits(x, weights.pop("w_router_hidden"), w_router)
            elif self.method.relative_scores:
                scores = scoring.router_cosines(x, w_router)
            else:
                scores = scoring.router_logits(x, w_router)
        gate = low_rank_gate if self.config.factorised_gate else whole_gate
        balance_scores = scores[:: self.balance.aux_stride]
        y, stats, per_token = self.pipeline(
            devices, x, given, scores, balance_scores, gate, weights
        )
        if self.needs_key and given.key is not None:
            key = jax.random.fold_in(given.key, 0)  # the selection may draw from the key itself
            with jax.named_scope("balance"):
                loss = coupling.coupling_loss(
                    devices, w_router, weights["w_g"], self.balance.coupling_alpha, key
                )
            stats = stats._replace(coupling=loss)
        return y, stats, per_token

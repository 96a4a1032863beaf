"""Routing-Free MoE (Liu et al., arXiv 2604.00801): every expert chooses its tokens by itself.

    G[t, i] = ReLU(score[t, i] - b[i]);  expert i processes token t if G >= theta, with weight G

b is a parameter; theta, mu and eta are settings. f[t, i] is 1 where G >= theta and 0 elsewhere. The
loss L and the update of lambda use means over the experts of all layers together:

    L = lambda (mu mean_i(mean_t(f) mean_t(G)) + (1 - mu) mean_t(mean_i(f) mean_i(G)))
    after each step  lambda <- lambda (1 + eta)^sign(mean_ti(f) - K / n),  at most 1

So the mean number of experts per token and layer approaches K = `experts.top_k`.

The method follows the paper. Two details come from the authors' code: G below theta counts as 0 in
the losses, and lambda is at most 1. The factor that their code learns for each score is left out.
AoE with this router is the published method, except that AoE's initialisation makes the norms start
near sqrt(r), where r is the rank of the gates. Each micro-batch has its own mean_t(G). Scores
from a router are this project's addition. Its logits are around 0, so set the initial b below
0: otherwise few G reach theta, and an inactive expert gets no gradient and stays inactive.

The method is causal and needs n slots per token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Method, by_mask
from aoe_jax.moe.scoring import KEPT_ROUTING
from aoe_jax.parameters import vector


@dataclass(frozen=True)
class RoutingFree(Method):
    """The router. The parameter `score_bias [n]` is b, and the state `multiplier []` is lambda."""

    name = "routing_free"

    threshold: float = setting(1.0, at_least=0)  # theta
    bias: float = setting(1e-6, training_only=True)  # initial b
    multiplier: float = setting(1e-10, above=0, at_most=1, training_only=True)  # initial lambda
    rate: float = setting(0.02, at_least=0, training_only=True)  # eta
    # mu, the weight of the term that balances experts; the term for tokens has the weight 1 - mu.
    expert_share: float = setting(0.5, at_least=0, at_most=1, training_only=True)

    def __call__(self, scores, weights, ctx):
        gates = jax.nn.relu(scores - weights["score_bias"])
        active = checkpoint_name(jax.lax.stop_gradient(gates) >= self.threshold, KEPT_ROUTING)
        gates = jnp.where(active, gates, 0)
        is_real = ctx.token_weights[:, None] > 0
        active, gates = active & is_real, jnp.where(is_real, gates, 0)
        routing = by_mask(active, gates)
        if not ctx.training:
            return routing
        sums, n_tokens = ctx.devices.total((gates.sum(axis=0), ctx.token_weights.sum()))
        return routing._replace(
            records={"gates": sums / jnp.maximum(n_tokens, 1)},
            per_token={
                "active": active.mean(axis=1),
                "gates": gates.mean(axis=1),
                "weight": ctx.token_weights,
            },
        )

    def parameters(self, experts):
        return {"score_bias": vector("n", initializers.constant(self.bias))}

    def state(self, experts, balance, d):
        return {"multiplier": jnp.full((), self.multiplier, jnp.float32)}

    def losses(self, stats, state, weights):
        # The means over tokens are `[L, n]`; the means over the experts of a layer are `[L, B, S]`.
        by_expert = stats.load * stats.records["gates"]
        means, token_weights = stats.per_token, stats.per_token["weight"][0]
        by_token = means["active"].mean(axis=0) * means["gates"].mean(axis=0) * token_weights
        of_tokens = by_token.sum() / jnp.maximum(token_weights.sum(), 1)
        value = self.expert_share * by_expert.mean() + (1 - self.expert_share) * of_tokens
        return {"density_loss": (state["multiplier"][0], value)}

    def update(self, config, state, stats, weights):
        target = config.experts.top_k / config.experts.n_experts
        factor = (1 + self.rate) ** jnp.sign(stats.load.mean() - target)
        return {"multiplier": jnp.minimum(state["multiplier"] * factor, 1)}, {}

    def check(self, config):
        config.balance.refuse_losses("routing_free has a loss of its own; set it to 0")

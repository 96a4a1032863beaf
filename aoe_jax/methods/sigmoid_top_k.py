"""The router of DeepSeek-V3 (arXiv 2412.19437, Sec. 2.1.2), which dots.llm1 and GLM-4.5 use too.

    s[t, i] = sigmoid(logit[t, i]);  ranked[t, i] = s[t, i] + b[i]
    token t is routed to the K experts of highest ranked[t, i] in its G best groups
    weight of a chosen expert = scale s[t, i] / (sum of s[t, j] over the chosen j)

Groups are ranges of consecutive experts, of equal size; a token's best groups are those with the
highest sums of their two highest `ranked[t, i]`. With `norm_topk_prob=False` the weight is
`scale s[t, i]`. The selection bias b has no gradient. Loss-free balancing adds `balance.bias_rate`
to b[i] in each step if expert i has less than the mean load, and subtracts the rate if it has more.
In L_aux, the probability P[i] is the mean of `s[t, i] / sum_j s[t, j]` over tokens; with
`balance.aux_batch="sequence"` L_aux is the sequence-wise loss of the paper.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Choice, FixedK, Hooks, best_experts, by_token


def in_best_groups(ranked, n_groups, groups_per_token):
    """Returns `ranked [T, n]`, with -inf for experts outside the best groups of the token."""
    by_group = ranked.reshape(ranked.shape[0], n_groups, -1)
    of_groups = jax.lax.top_k(by_group, 2)[0].sum(axis=2)
    best = jax.lax.top_k(of_groups, groups_per_token)[1]
    is_best = (best[:, :, None] == jnp.arange(n_groups)).any(axis=1)
    return jnp.where(is_best[:, :, None], by_group, -jnp.inf).reshape(ranked.shape)


@dataclass(frozen=True)
class SigmoidTopK(FixedK):
    """Top-k by sigmoid scores, within the best groups. The state is `selection_bias [n]`."""

    name = "sigmoid_top_k"
    always_biased = True
    hooks = Hooks(balance_logits=jax.nn.log_sigmoid)

    norm_topk_prob: bool = True  # True: the weights of a token sum to `scale`
    scale: float = setting(1.0, above=0)  # factor of all weights (routed_scaling_factor)
    n_groups: int = setting(1, above=0)  # number of groups of experts
    # G, the number of groups from which a token's experts are chosen.
    groups_per_token: int = setting(1, above=0, at_most="n_groups")

    def __call__(self, scores, weights, ctx):
        probability = jax.nn.sigmoid(scores)
        ranked = jax.lax.stop_gradient(probability) + ctx.state["selection_bias"]
        if self.groups_per_token < self.n_groups:
            ranked = in_best_groups(ranked, self.n_groups, self.groups_per_token)
        expert = best_experts(ranked, ctx.top_k)
        weight = jnp.take_along_axis(probability, expert, axis=1)
        if self.norm_topk_prob:
            weight = weight / (weight.sum(axis=1, keepdims=True) + 1e-20)
        return by_token(expert, self.scale * weight)

    def choice(self, experts):
        return Choice(experts.top_k, is_fixed=True)

    def update(self, config, state, stats, weights):
        unit = jnp.ones(stats.load.shape[0])
        return super().update(config, state, stats._replace(score_spread=unit), weights)

    def check(self, config):
        experts = config.experts
        is_plain = not experts.factorised_gate and not experts.large_router
        if experts.kind != "router" or not is_plain:
            self.refuse("name", "is for a plain router with whole gates (experts.kind='router')")
        wanted = "is not implemented with routing.name='sigmoid_top_k'; set it to 0"
        config.balance.refuse_losses(wanted, ("entropy_weight", "z_weight"))
        size, rest = divmod(experts.n_experts, self.n_groups)
        if rest or size < 2:
            wanted = f"must divide experts.n_experts={experts.n_experts} into groups of at least 2"
            self.refuse("n_groups", wanted)
        n_allowed = size * self.groups_per_token
        if experts.top_k > n_allowed:
            wanted = f"leaves {n_allowed} experts to a token; experts.top_k={experts.top_k}"
            self.refuse("groups_per_token", f"{wanted} needs more groups")

"""Quantile balancing: top-k with a bias that would have balanced the last batch.

    token t is routed to the K experts of highest s[t, i] + b[i];  weights come from s alone
    a[t] = the (K + 1)-th largest of s[t, i] + b[i] over experts i
    b[i] <- -(the (T K / n + 1)-th largest of s[t, i] - a[t] over the T tokens t of the batch)

With the new b, except for ties, expert i is above a[t] for T K / n tokens. This is one step of an
alternating solution, because the new b changes a. There is no loss, no gradient and no rate, and
routing is causal, because b comes from earlier batches. The mean of b over experts, which changes
no choice, is subtracted. T counts the tokens of all devices. With micro-batches, b is the mean of
their solutions, which is an estimate; it does not change if one of them has no tokens.

Sources: kexue.fm/archives/11619, Megatron-LM's quantile balancing, and the report on Kimi K3 (Sec.
2.3.3), whose scores are sigmoids. Here scores are logits or norms.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.methods.ranks import largest_of_rank
from aoe_jax.moe.routing import FixedK, top_k


@dataclass(frozen=True)
class Quantile(FixedK):
    """The router. Its state is `selection_bias [n]`."""

    name = "quantile"
    always_biased = True

    norm_topk_prob: bool = True  # weights are the softmax over the chosen scores; False: over all
    # b is a moving average with this decay; 0: the solution of the last batch alone.
    decay: float = setting(0.0, at_least=0, below=1, training_only=True)

    def __call__(self, scores, weights, ctx):
        bias = ctx.state["selection_bias"]
        routing = top_k(scores, ctx.top_k, self.norm_topk_prob, bias)
        if not ctx.training:
            return routing
        constant, n_experts = jax.lax.stop_gradient(scores), scores.shape[1]
        next_best = jax.lax.top_k(constant + bias, ctx.top_k + 1)[0][:, -1:]
        counts, total = ctx.token_weights > 0, ctx.devices.total
        whole, rest = jnp.divmod(total(counts.sum(dtype=jnp.int32)), n_experts)
        rank = whole * ctx.top_k + rest * ctx.top_k // n_experts + 1
        solution = -largest_of_rank(constant - next_best, counts, rank, total)
        return routing._replace(records={"solution": solution})

    def update(self, config, state, stats, weights):
        bias, found = state["selection_bias"], stats.records["solution"]
        found -= found.mean(axis=-1, keepdims=True)
        new = self.decay * bias + (1 - self.decay) * found
        return {"selection_bias": jnp.where(jnp.isfinite(found), new, bias)}, {}

    def check(self, config):
        if config.balance.bias_rate:
            self.refuse("name", "has its own bias; set balance.bias_rate=0")
        if config.experts.top_k == config.experts.n_experts:
            self.refuse("name", "balances a choice; set experts.top_k below experts.n_experts")

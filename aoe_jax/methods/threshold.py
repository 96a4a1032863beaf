"""Expert Threshold routing (Sun et al., arXiv 2603.11535): a token is routed to every expert
for which its score is above the expert's threshold c.

    token t is routed to expert i if score[t, i] > c[i];  weight = sigmoid(score[t, i])
    c[i] <- decay c[i] + (1 - decay) (the k-th largest score of expert i in the batch),  k = T K / n

Each step uses thresholds from earlier steps, so the experts of a token do not depend on other
tokens: routing is causal. A token may have any number of experts, K = `experts.top_k` on average.
In the first `warmup_steps` steps each expert chooses its k tokens of highest score (expert choice),
which is not causal.

The method follows the paper's text, with these exceptions. There is no shared expert and no limit
for the number of tokens of an expert. The first threshold is the k-th largest score of the first
batch. With micro-batches, experts choose within each micro-batch in the warm-up, and thresholds are
updated with the mean of the micro-batches' k-th largest scores. `weights="relative"` is an addition
for AoE: the weight is sigmoid(score - threshold), because norms are positive and sigmoid(score)
would never be below 1/2. No balance loss is needed. The method needs n slots per token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.methods.ranks import largest_of_rank
from aoe_jax.moe.routing import Causality, Choice, Method, by_mask
from aoe_jax.moe.scoring import KEPT_ROUTING


@dataclass(frozen=True)
class Threshold(Method):
    """The router. Its state is `threshold [n]` and `updates []`, the number of updates so far."""

    name = "threshold"

    # Decay of the moving average that updates an expert's threshold.
    decay: float = setting(0.999, at_least=0, below=1, training_only=True)
    warmup_steps: int = setting(4000, at_least=0, training_only=True)  # steps of expert choice
    # The weight of an expert. sigmoid: sigmoid(score); relative: sigmoid(score - threshold).
    weights: str = setting("sigmoid", choices=("sigmoid", "relative"))

    def __call__(self, scores, weights, ctx):
        thresholds, constant = ctx.state["threshold"], jax.lax.stop_gradient(scores)
        chosen, records = constant > thresholds, None
        if ctx.training:
            counts, total = ctx.token_weights > 0, ctx.devices.total
            n_taken = total(counts.sum(dtype=jnp.int32)) * ctx.top_k
            k = jnp.maximum(-(-n_taken // scores.shape[1]), 1)
            kth = largest_of_rank(constant, counts, k, total)
            records = {"kth_largest": kth}
            in_warmup = ctx.state["updates"] < self.warmup_steps
            chosen = jnp.where(in_warmup, constant.astype(jnp.float32) >= kth, chosen)
        chosen = checkpoint_name(chosen & (ctx.token_weights[:, None] > 0), KEPT_ROUTING)
        is_relative = self.weights == "relative"
        weight = jax.nn.sigmoid(scores - thresholds if is_relative else scores)
        return by_mask(chosen, weight)._replace(records=records)

    def causality(self, experts):
        reason = "experts choose tokens of the whole batch in the first routing.warmup_steps steps"
        return Causality(reason, self.warmup_steps) if self.warmup_steps else Causality()

    def choice(self, experts):
        return Choice(experts.top_k)

    def state(self, experts, balance, d):
        return {"threshold": jnp.zeros(experts.n_experts), "updates": jnp.zeros(())}

    def update(self, config, state, stats, weights):
        updates, found = state["updates"], stats.records["kth_largest"]
        kept = jnp.where(updates == 0, 0, self.decay)[:, None]
        has_tokens = jnp.isfinite(found).all(axis=1)  # without tokens nothing changes
        threshold = kept * state["threshold"] + (1 - kept) * found
        threshold = jnp.where(has_tokens[:, None], threshold, state["threshold"])
        return {"threshold": threshold, "updates": updates + has_tokens}, {}

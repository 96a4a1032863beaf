"""Inference of SparseMixer-v2, for trained models such as Phi-3.5-MoE (GRIN, arXiv 2409.12136).

Each token is routed to its K experts of highest score. The weight of a chosen expert is its
probability in a softmax over the experts that were not chosen before it and whose scores are near
its own. A score is near if it is smaller by at most `2 jitter` times the larger of the two absolute
values. In training SparseMixer samples experts; training is not implemented.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import FixedK, best_experts, by_token


def sparsemixer_weights(scores, expert, jitter):
    """The weights `[T, K]` of the experts `expert [T, K]`, which are ordered by falling score."""
    weights, left = [], scores
    for chosen in expert.T:
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)
        # If both scores are 0, 0 / 0 is NaN, and NaN > 2 jitter is false: the scores are near.
        is_far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * jitter
        probability = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left))
        weights.append(jnp.take_along_axis(probability, chosen[:, None], axis=1))
        is_chosen = chosen[:, None] == jnp.arange(scores.shape[1])
        left = jnp.where(is_chosen, -jnp.inf, left)
    return jnp.concatenate(weights, axis=1)


@dataclass(frozen=True)
class SparseMixer(FixedK):
    """Top-k with SparseMixer's weights, for models that are trained already."""

    name = "sparsemixer"

    # Scores are near if they differ by at most 2 jitter times the larger absolute value.
    jitter: float = setting(0.01, at_least=0)

    def __call__(self, scores, weights, ctx):
        if ctx.training:
            self.check_training()
        expert = best_experts(scores, ctx.top_k)
        return by_token(expert, sparsemixer_weights(scores, expert, self.jitter))

    def check_training(self):
        self.refuse("name", "can be used but not trained; train with 'top_k'")

"""Top-k with a slot for every token and expert, which `benchmarks.slots` times."""

from dataclasses import dataclass

import jax.numpy as jnp

from aoe_jax.moe.routing import Choice, TopK, by_mask


@dataclass(frozen=True)
class AllSlots(TopK):
    """`TopK` in the layout of routers that give a token any number of experts."""

    def choice(self, experts):
        return Choice()

    def __call__(self, scores, weights, ctx):
        """The experts and weights of `TopK`, with n slots per token."""
        routing = super().__call__(scores, weights, ctx)
        expert, weight = (a.reshape(-1, ctx.top_k, 1) for a in (routing.expert, routing.weight))
        is_expert = expert == jnp.arange(scores.shape[1])
        return by_mask(is_expert.any(axis=1), jnp.where(is_expert, weight, 0).sum(axis=1))

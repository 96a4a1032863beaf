"""Top-p routing: token choice of a varying number of experts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Method, by_token
from aoe_jax.moe.scoring import KEPT_ROUTING


@dataclass(frozen=True)
class TopP(Method):
    """Routes a token to the smallest set of experts whose total probability is above p (Huang et
    al. 2024, arXiv 2403.07652). Weights are the softmax values, not normalised again.
    """

    name = "top_p"

    p: float = setting(0.6, above=0, below=1)

    def __call__(self, scores, weights, ctx):
        n_experts = scores.shape[1]
        probability = jax.nn.softmax(scores)
        values, expert = jax.lax.top_k(jax.lax.stop_gradient(probability), n_experts)
        chosen = jnp.cumsum(values, axis=1) - values <= self.p
        expert = checkpoint_name(jnp.where(chosen, expert, n_experts), KEPT_ROUTING)
        weight = jnp.take_along_axis(probability, expert, axis=1, mode="fill", fill_value=0)
        return by_token(expert, weight)

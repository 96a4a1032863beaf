"""Expert choice routing: every expert chooses its tokens."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Causality, Choice, Method, Routing, by_mask
from aoe_jax.moe.scoring import KEPT_ROUTING


@dataclass(frozen=True)
class ExpertChoice(Method):
    """Every expert chooses its C tokens of highest score (Zhou et al. 2022, arXiv 2202.09368).

    C is the number of tokens of the batch times `capacity_factor / n`, rounded up. Weights are the
    softmax over experts, not normalised again. Padding is never chosen and does not count for C.
    """

    name = "expert_choice"

    capacity_factor: float = setting(2.0, above=0)  # mean number of experts per token

    def __call__(self, scores, weights, ctx):
        probability = jax.nn.softmax(scores)
        devices, n_experts = ctx.devices, scores.shape[1]
        everywhere = devices.all_tokens(jax.lax.stop_gradient(probability))
        token, is_real = self._tokens_of_experts(everywhere, devices.all_tokens(ctx.token_weights))
        expert = jnp.arange(n_experts, dtype=jnp.int32)[:, None]
        if devices.total_size > 1:
            chosen = jnp.zeros(everywhere.shape, bool).at[token, expert].set(is_real)
            return by_mask(devices.own_tokens(chosen), probability)
        weight = jnp.where(is_real, jnp.take_along_axis(probability.T, token, axis=1), 0)
        expert = jnp.where(is_real, expert, n_experts)
        return Routing(token.reshape(-1), expert.reshape(-1), weight.reshape(-1), None)

    def _tokens_of_experts(self, probability, token_weights):
        """The tokens that experts choose, `[n, C]` int32, and which ones count, `[n, C]` bool."""
        n_tokens, n_experts = probability.shape
        capacity = expert_capacity(n_tokens, n_experts, self.capacity_factor)
        is_real = token_weights > 0
        token = jax.lax.top_k(jnp.where(is_real, probability.T, -1), capacity)[1]
        token = checkpoint_name(token, KEPT_ROUTING)
        capacity_of_real = jnp.ceil(is_real.sum() * self.capacity_factor / n_experts)
        return token, is_real[token] & (jnp.arange(capacity) < capacity_of_real)

    def causality(self, experts):
        reason = "an expert chooses among all tokens of the batch, later ones included"
        return Causality(reason, no_decoding=reason)

    def choice(self, experts):
        return Choice(self.capacity_factor)

    def check(self, config):
        if self.capacity_factor > config.experts.n_experts:
            wanted = f"must be at most experts.n_experts={config.experts.n_experts}"
            self.refuse("capacity_factor", wanted)


def expert_capacity(n_tokens, n_experts, capacity_factor):
    """The largest number of tokens of an expert: `ceil(T capacity_factor / n)`, at most T."""
    return min(n_tokens, math.ceil(n_tokens * capacity_factor / n_experts))

"""A router whose experts are chosen by norms of what they compute (the paper's Tables 1, 6 and 7).

All experts of a router MoE run up to a node, the norms there replace the router's logits, and the
top K experts process the token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.moe.routing import Choice, Method, best_experts, by_token
from aoe_jax.parameters import EXPERTS

# What an expert has computed of tokens `x [T, d]` at a node, from its matrices, in the paper's
# names: Wg, Wp, Wo are W_gate, W_up, W_down.
NODES = {
    "x Wg": lambda x, w: x @ w["w_gate"],
    "x Wp": lambda x, w: x @ w["w_up"],
    "SiLU(x Wg)": lambda x, w: jax.nn.silu(x @ w["w_gate"]),
    "SiLU(x Wg) * x Wp": lambda x, w: jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"]),
    "output": lambda x, w: (jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"],
}
NORMS = {
    "L1": lambda a: jnp.abs(a).sum(axis=-1),
    "L2": lambda a: jnp.sqrt(jnp.square(a).sum(axis=-1)),
    "Linf": lambda a: jnp.abs(a).max(axis=-1),
}

# A choice is a function `(router logits [T, n], weights, ctx) -> scores [T, n]`.


def by_router(logits, weights, ctx):
    """The model's own choice."""
    return logits


def by_chance(logits, weights, ctx):
    """Random experts, others in each layer and for each token; the same on every mesh."""
    # A number that differs between layers and not between devices.
    total = weights["w_router"].astype(jnp.float32).sum()
    key = jax.random.fold_in(jax.random.key(0), jax.lax.bitcast_convert_type(total, jnp.int32))
    shape = (logits.shape[0] * ctx.devices.total_size, logits.shape[1])
    return ctx.devices.own_tokens(jax.random.uniform(key, shape))


def by_norm(node, norm):
    """The choice by a norm (of `NORMS`) of what experts have computed at a node (of `NODES`)."""

    def choose(logits, weights, ctx):
        devices, dtype = ctx.devices, ctx.x.dtype
        tokens = devices.gather(ctx.x, "expert")
        whole = {
            name: devices.gather_weight(EXPERTS[name], weights[name], dtype)
            for name in ("w_gate", "w_up", "w_down")
        }
        # One expert after another: all activations would be the largest array of the model.
        norms = jax.lax.map(
            lambda w: NORMS[norm](NODES[node](tokens, w).astype(jnp.float32)), whole
        )
        return devices.exchange(norms.T, split=0, concatenate=1)

    return choose


@dataclass(frozen=True)
class ProbeRouter(Method):
    """Top-k of other scores than the router's logits.

    Its record `agreement []` is the mean share of a token's experts that the router would have
    chosen.
    """

    name = "probe"

    choose: Callable = by_router
    equal_weights: bool = False  # 1 / K each; False: the softmax over the chosen scores

    def choice(self, experts):
        return Choice(experts.top_k, is_fixed=True)

    def __call__(self, scores, weights, ctx):
        k, n_experts = ctx.top_k, scores.shape[1]
        other_scores = self.choose(scores, weights, ctx)
        expert = best_experts(other_scores, k)
        if self.equal_weights:
            weight = jnp.full(expert.shape, 1 / k, scores.dtype)
        else:
            weight = jax.nn.softmax(jnp.take_along_axis(other_scores, expert, axis=1))
        is_chosen, is_routed = (
            jax.nn.one_hot(e, n_experts).sum(axis=1) for e in (expert, best_experts(scores, k))
        )
        share = (is_chosen * is_routed).sum(axis=1) / k
        sums = jnp.sum(share * ctx.token_weights), ctx.token_weights.sum()
        agreement, n_tokens = ctx.devices.total(sums)
        return by_token(expert, weight)._replace(records={"agreement": agreement / n_tokens})

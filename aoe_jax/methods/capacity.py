"""`experts.kind="capacity"`: a router MoE with expert capacity and token dropping, after GShard
(arXiv 2006.16668) and Switch (arXiv 2101.03961).

Each sequence is one group of tokens. In each group an expert has C places: it processes at most C
tokens. The first choices of all tokens get places before any second choice, in the order of the
tokens. If the chosen expert has no free place, the choice is dropped and adds nothing to the output
of its token. Dispatch and combine are products with arrays `[B, S, n, C]`; all shapes are fixed.

With more than one expert per token the layer is NOT CAUSAL: the first choice of a later token may
get the place that an earlier token's second choice needs. With one expert per token it is causal.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.config.checks import setting
from aoe_jax.methods.expert_choice import expert_capacity
from aoe_jax.moe.layer import rematerialised
from aoe_jax.moe.routing import Causality, FixedK, top_k
from aoe_jax.moe.swiglu import single_expert
from aoe_jax.parameters import EXPERTS, ROUTER


def assign_places(expert, n_experts, capacity):
    """Assigns places in each group: all first choices come first, in the order of the tokens.

    `expert [B, S, K]` int32 are the choices of each token, the first choice first; n for padding.
    Returns `(place, number of dropped choices)`. `place [B, S, n]` int32 is a token's place in each
    expert, from 0 to C - 1, or C if the token has no place in this expert.
    """
    n_groups, n_tokens, k = expert.shape
    chosen = jax.nn.one_hot(expert, n_experts, dtype=jnp.int32)
    by_rank = chosen.swapaxes(1, 2).reshape(n_groups, k * n_tokens, n_experts)
    before = jnp.cumsum(by_rank, axis=1) - by_rank
    before = before.reshape(n_groups, k, n_tokens, n_experts).swapaxes(1, 2)
    place = jnp.where(chosen > 0, jnp.minimum(before, capacity), capacity).min(axis=2)
    return place, chosen.sum() - (place < capacity).sum()


def experts_of_places(x, place, weight, capacity, w, devices):
    """Computes the sum of each token's expert outputs, weighted by `weight [B, S, n]`.

    `x [B, S, d]` -> `[B, S, d]`, zero for a token without a place. `place` is the result of
    `assign_places`. `w` are the matrices of this device's experts in the dtype of `x`.
    """
    with jax.named_scope("dispatch"):  # dispatch[b, s, n, c]: 1 if token s has place c of expert n
        dispatch = (place[..., None] == jnp.arange(capacity)).astype(x.dtype)
        rows = devices.exchange(jnp.einsum("gtnc,gtd->ngcd", dispatch, x), 0, 1)
    with jax.named_scope("experts"):
        by_expert = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        rows = single_expert(by_expert, w).reshape(rows.shape)
    with jax.named_scope("combine"):
        combine = weight.astype(x.dtype)[..., None] * dispatch
        return jnp.einsum("gtnc,ngcd->gtd", combine, devices.exchange(rows, 1, 0))


@dataclass(frozen=True)
class Capacity(FixedK):
    """A top-k router whose experts have C = ceil(capacity_factor K S / n) places per sequence.

    Statistics, balance losses and the selection bias are computed from all choices, also from the
    dropped ones. `dropped_share` is the fraction of the choices that are dropped.
    """

    name = "capacity"

    capacity_factor: float = setting(2.0, above=0)
    norm_topk_prob: bool = True  # weights are a softmax over the chosen scores; False: over all

    def __call__(self, x, weights, layer, ctx):
        n, devices = layer.experts.n_experts, ctx.devices
        with jax.named_scope("score"):
            scores = layer.score(x, weights, ctx)
        with jax.named_scope("route"):
            bias = ctx.state.get("selection_bias")
            routing = top_k(scores.values, ctx.top_k, self.norm_topk_prob, bias)
            expert, weight = (a.reshape(-1, ctx.top_k) for a in (routing.expert, routing.weight))
            is_real = ctx.token_weights[:, None] > 0  # padding gets no place
            expert = jnp.where(is_real, expert, n)
            expert, weight = map(devices.whole_sequences, (expert, weight))
            capacity = self.places(expert.shape[1], layer.experts)
            place, dropped = assign_places(expert, n, capacity)
            weight = (weight[..., None] * jax.nn.one_hot(expert, n)).sum(axis=2)
        with jax.named_scope("balance"):
            stats = layer.statistics(scores, routing, weights, ctx)
            # Devices along tensor count the same groups, so the count is divided by their number.
            dropped = dropped / (ctx.top_k * devices.size("tensor"))
            dropped, n_tokens = devices.total((dropped, ctx.token_weights.sum()))
            stats = stats._replace(dropped_share=dropped / jnp.maximum(n_tokens, 1))

        def compute(x, place, weight, weights):
            with jax.named_scope("experts"):
                w = layer.gathered(weights, devices)
            groups = devices.whole_sequences(x)
            y = experts_of_places(groups, place, weight, capacity, w, devices)
            return devices.sum_scatter(y, "tensor", 1).reshape(x.shape)

        matrices = {name: weights[name] for name in ("w_gate", "w_up", "w_down")}
        return rematerialised(compute, devices)(x, place, weight, matrices), stats

    def places(self, n_tokens, experts):
        """Returns C, the number of places of an expert in a sequence of `n_tokens` tokens."""
        factor = self.capacity_factor * experts.top_k
        return expert_capacity(n_tokens, experts.n_experts, factor)

    def causality(self, experts):
        reason = (
            f"with experts.top_k={experts.top_k} the first choices of later tokens take the places "
            "of earlier tokens' other choices"
        )
        no_decoding = (
            "whether a token gets a place of an expert depends on the other tokens of the text and "
            "on the length of the text"
        )
        reason = reason if experts.top_k > 1 else ""
        return Causality(reason, no_decoding=no_decoding, padding_counts=True)

    def parameters(self, experts):
        return ROUTER | {name: EXPERTS[name] for name in ("w_up", "w_down", "w_gate")}

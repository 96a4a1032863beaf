"""Decodes with self-contrast: the next token depends on the logits of two passes of one model.

Self-contrast (SCMoE, arXiv 2405.14507) needs no training. Both passes process the same text, each
with its own key-value cache:

    strong   the unchanged model
    weak     in all layers, each token is routed only to its expert of rank 2, with weight 1

    z = (1 + beta) z_strong - beta z_weak   where z_strong >= log(0.1) + max z_strong, else -inf

The next token has the largest z, or is drawn from softmax(z). The paper takes beta from 0.1, 0.3,
0.5, 0.7 and 0.9, the best value for each task; rank 2 and the factor 0.1 are the paper's.

This implementation ranks experts by the model's own scores (router logits or AoE's norms, plus the
bias of loss-free balancing), and applies temperature, top-k and top-p to z. Ranks start at 1, as in
the paper.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp

from aoe_jax.config.checks import require
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.routing import FixedK, best_experts, by_token


@dataclass(frozen=True)
class SecondBest(FixedK):
    """Routes each token to its one expert of rank 2, with weight 1."""

    name = "second_best"
    norm_topk_prob = True  # the weight is the softmax over one score

    def __call__(self, scores, weights, ctx):
        """`scores [T, n]` -> a `Routing` with T slots."""
        expert = best_experts(scores, 2, ctx.state.get("selection_bias"))[:, 1:]
        return by_token(expert, jnp.ones(expert.shape, scores.dtype))


def weak_pass(decoder: Decoder):
    """Returns the decoder of the weak pass, which uses the parameters of `decoder`. Raises
    `UserError` unless the model is an AoE or router MoE with top-k or top-p routing and two experts
    at least.
    """
    experts = decoder.experts
    wanted = "--contrast needs ranks of experts; use a model of kind aoe or router"
    require(experts.kind in ("aoe", "router"), "experts.kind", experts.kind, wanted)
    name = decoder.routing.name
    wanted = "--contrast is not tested with this router; use a model with top_k or top_p"
    require(name in ("top_k", "top_p"), "routing.name", name, wanted)
    wanted = "--contrast needs a second expert"
    require(experts.n_experts > 1, "experts.n_experts", experts.n_experts, wanted)
    return decoder.clone(experts=dataclasses.replace(experts, top_k=1), routing=SecondBest())


def contrasted(strong, weak, beta):
    """Computes z `[..., V]` float32 from the logits of both passes; excluded tokens get -inf."""
    lowest = strong.max(axis=-1, keepdims=True) + math.log(0.1)
    # In this form of the formula, equal logits of both passes stay exactly unchanged.
    return jnp.where(strong >= lowest, strong + beta * (strong - weak), -jnp.inf)

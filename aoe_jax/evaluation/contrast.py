"""Decodes with self-contrast: the next token depends on the logits of two passes of one model.

Self-contrast (SCMoE, arXiv 2405.14507) needs no training. Both passes process the same text, each
with its own key-value cache:

    strong   the unchanged model, or the model with another number K of experts per token
    weak     in all layers, each token is routed only to its expert of rank k, with weight 1

    z = (1 + beta) z_strong - beta z_weak   where z_strong >= log(alpha) + max z_strong, else -inf

The next token has the largest z, or is drawn from softmax(z). The published settings are alpha =
0.1 and k = 2; beta is 0.1, 0.3, 0.5, 0.7 or 0.9, the best value for each task.

This implementation ranks experts by the model's own scores (router logits or AoE's norms, plus the
bias of loss-free balancing), and applies temperature, top-k and top-p to z. Ranks start at 1 in
this module and on the command line, as in the paper, but at 0 in `config.routing.ranks`.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from aoe_jax.config.checks import require, require_flag
from aoe_jax.methods.ranked import Ranked
from aoe_jax.model.decoder import Decoder


@dataclass(frozen=True)
class Contrast:
    """Settings of self-contrast."""

    beta: float  # weight of the difference of the logits; 0: the weak pass has no effect
    alpha: float = 0.1  # 0 to 1; excludes tokens below alpha * the largest probability
    strong_k: int | None = None  # experts per token in the strong pass; None: unchanged
    weak_rank: int = 2  # rank of each token's only expert in the weak pass; 1: highest score


def strong_and_weak(decoder: Decoder, contrast: Contrast):
    """Returns the decoders of the two passes; both use the parameters of `decoder`. Raises
    `UserError` if the model is not an AoE or router MoE with top-k or top-p routing, or if
    `strong_k` or `weak_rank` does not fit the model.
    """
    experts, k, rank = decoder.experts, contrast.strong_k, contrast.weak_rank
    wanted = "--contrast needs ranks of experts; use a model of kind aoe or router"
    require(experts.kind in ("aoe", "router"), "experts.kind", experts.kind, wanted)
    name = decoder.routing.name
    wanted = "--contrast is not tested with this router; use a model with top_k or top_p"
    require(name in ("top_k", "top_p"), "routing.name", name, wanted)
    wanted = f"cannot be greater than the model's experts.n_experts={experts.n_experts}"
    require_flag(k is None or k <= experts.n_experts, "strong_k", k, wanted)
    require_flag(rank <= experts.n_experts, "weak_rank", rank, wanted)
    wanted = f"the model's routing.name={name!r} has no K; omit this flag"
    require_flag(k is None or name == "top_k", "strong_k", k, wanted)
    strong = dataclasses.replace(experts, top_k=k or experts.top_k)
    weak = dataclasses.replace(experts, top_k=1)
    routing = Ranked((rank - 1,))
    return decoder.clone(experts=strong), decoder.clone(experts=weak, routing=routing)


def contrasted(strong, weak, contrast: Contrast):
    """Computes z `[..., V]` float32 from the logits of both passes; excluded tokens get -inf."""
    lowest = strong.max(axis=-1, keepdims=True) + jnp.log(contrast.alpha)
    # In this form of the formula, equal logits of both passes stay exactly unchanged.
    return jnp.where(strong >= lowest, strong + contrast.beta * (strong - weak), -jnp.inf)

"""Self-contrast: a model against itself with badly chosen experts (SCMoE, arXiv 2405.14507).

Nothing is trained. Two passes, each with a cache of its own, read the same text:

    strong   the model as it is, or with another K
    weak     each token goes only to its expert of rank k, with weight 1, in all layers

    z = (1 + beta) z_strong - beta z_weak   where z_strong >= log(alpha) + max z_strong, else -inf

The next token is the likeliest by z, or drawn from softmax(z). The published settings are alpha =
0.1, k = 2, and beta searched in 0.1, 0.3, ... 0.9 for each task.

Our choices: experts are ranked by the model's own scores (router logits or AoE's norms, with the
bias of loss-free balancing), and temperature, top-k and top-p apply to z. Ranks count from 1 here
and on the command line, as in the paper, but from 0 in `config.routing.ranks`.
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

    beta: float  # 0: the strong pass alone
    alpha: float = 0.1  # the least probability of a token, relative to the likeliest; 0 to 1
    strong_k: int | None = None  # experts per token of the strong pass; None: the model's choice
    weak_rank: int = 2  # rank of the expert of the weak pass; 1 has the highest score


def strong_and_weak(decoder: Decoder, contrast: Contrast):
    """The decoders of the two passes; both take the parameters of `decoder`. Raises `UserError` if
    the selection has no ranks, there are too few experts, or K is set for a selection without K.
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
    wanted = f"the model's routing.name={name!r} has no K; leave it out, for the model's own choice"
    require_flag(k is None or name == "top_k", "strong_k", k, wanted)
    strong = dataclasses.replace(experts, top_k=k or experts.top_k)
    weak = dataclasses.replace(experts, top_k=1)
    routing = Ranked((rank - 1,))
    return decoder.clone(experts=strong), decoder.clone(experts=weak, routing=routing)


def contrasted(strong, weak, contrast: Contrast):
    """The logits z `[..., V]` float32 of strong and weak logits; -inf for excluded tokens."""
    lowest = strong.max(axis=-1, keepdims=True) + jnp.log(contrast.alpha)
    # This form with a difference leaves logits that are equal in both passes exactly unchanged.
    return jnp.where(strong >= lowest, strong + contrast.beta * (strong - weak), -jnp.inf)

"""Self-contrast: a model against itself with its experts chosen badly (SCMoE, arXiv 2405.14507,
NeurIPS 2024).

Nothing is trained. Two passes read the same text:

    strong   the model as it is, or with another K of its top-K
    weak     rank-k routing: of every layer, for the prompt as well, only the expert of the k-th highest score, weight 1

    z = (1 + beta) z_strong - beta z_weak   where z_strong >= log(alpha) + max z_strong, elsewhere -inf

and the next token is the likeliest by z, or drawn from its softmax. Both passes then read that
token.

As published: the formula, alpha = 0.1, weak rank 2, weak routing in all layers and for the prompt,
a cache for each pass. The authors search beta in 0.1, 0.3, ... 0.9 for each task, and in one table
the strong K as well. Their figures for Mixtral 8x7B (strong top-2, weak rank 2, against greedy
decoding): GSM8K 61.79 -> 66.94, StrategyQA 72.83 -> 76.29, MBPP 46.20 -> 48.80, HumanEval 33.54 ->
41.46, at 1.30 times the latency.

Ours: ranks are by the scores that the model itself chooses by, router logits or AoE's norms, and
with the selection bias of loss-free balancing where there is one; the weight is 1 whatever the
model's gate. Temperature, top-k and top-p of sampling apply to z; the paper draws from its softmax
as it is.

Ranks count from 1 here and on the command line, as in the paper; from 0 in `config.experts.ranks`
and in the authors' code.

Causal: both passes are, so what is drawn depends on earlier tokens only. It costs a second pass, of
one expert a token, and a second cache of keys and values; the weights are shared.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp

from aoe_jax.config import BY_SCORES_ALONE
from aoe_jax.errors import UserError
from aoe_jax.model.decoder import Decoder


@dataclass(frozen=True)
class Contrast:
    """How far the strong pass is pushed away from the weak one, and what the two are."""

    beta: float  # 0: nothing is
    alpha: float = 0.1  # of the probability of the likeliest token by the strong pass, below which no token is taken
    strong_k: int | None = (
        None  # experts per token of the strong pass; None: the model's own choice
    )
    weak_rank: int = 2  # of the one expert of the weak pass, from 1, that of highest score

    def __post_init__(self):
        if not 0 <= self.beta < math.inf:
            raise UserError(
                f"--contrast={self.beta}: must be 0 (no contrast) or greater, such as 0.5"
            )
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"--alpha={self.alpha}: must lie between 0 (any token) and 1 (the likeliest only)"
            )
        if self.strong_k is not None and self.strong_k < 1:
            raise UserError(f"--strong_k={self.strong_k}: must be 1 or greater")
        if self.weak_rank < 1:
            raise UserError(
                f"--weak_rank={self.weak_rank}: must be 1 (the expert of highest score) or greater"
            )


def strong_and_weak(decoder: Decoder, contrast: Contrast):
    """The decoders of the two passes; they take the same parameters.

    Raises:
      UserError: experts have no ranks, there are fewer, or the model doesn't choose by K.
    """
    experts = decoder.experts
    if experts.kind not in ("aoe", "router"):
        raise UserError(
            f"config.experts.kind={experts.kind!r}: --contrast takes the experts of a token by the ranks of their scores; "
            "use a model of kind aoe or router"
        )
    if experts.selection not in BY_SCORES_ALONE:
        raise UserError(
            f"config.experts.selection={experts.selection!r}: --contrast isn't tried with it; use a model of selection "
            f"{' or '.join(BY_SCORES_ALONE)}"
        )
    for flag, value in (("strong_k", contrast.strong_k), ("weak_rank", contrast.weak_rank)):
        if value is not None and value > experts.n_experts:
            raise UserError(
                f"--{flag}={value}: can't be greater than the model's experts.n_experts={experts.n_experts}"
            )
    strong = experts
    if contrast.strong_k is not None:
        if experts.selection != "top_k":
            raise UserError(
                f"--strong_k={contrast.strong_k}: the model's experts.selection={experts.selection!r} takes no K; leave it "
                "out, for the model's own choice"
            )
        strong = dataclasses.replace(experts, top_k=contrast.strong_k)
    weak = experts.choosing(
        selection="ranked", ranks=(contrast.weak_rank - 1,), top_k=1, gate="chosen"
    )
    return decoder.clone(experts=strong), decoder.clone(experts=weak)


def contrasted(strong, weak, contrast: Contrast):
    """The logits z, of strong and weak ones, all `[..., V]` float32; -inf for tokens that aren't
    taken.
    """
    lowest = strong.max(axis=-1, keepdims=True) + jnp.log(contrast.alpha)
    # As a difference, so that equal logits stay as they are.
    return jnp.where(strong >= lowest, strong + contrast.beta * (strong - weak), -jnp.inf)

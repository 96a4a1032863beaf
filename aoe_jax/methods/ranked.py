"""Routes tokens to experts of given ranks, for self-contrast (`aoe_jax/evaluation/contrast.py`)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from aoe_jax.moe.routing import FixedK, best_experts, by_token


def ranked(scores, ranks, bias=None):
    """Routes tokens to the experts whose `scores [T, n]` have these ranks, in `T len(ranks)` slots.

    `ranks` are different numbers from 0 (the highest score) to n - 1. Of two equal scores, the one
    of the lower expert number has the lower rank. Weights are the softmax over the chosen scores,
    so a single expert has weight 1. A `bias [n]` is added to the scores only to rank them.
    """
    by_rank = best_experts(scores, max(ranks) + 1, bias)
    expert = jnp.stack([by_rank[:, rank] for rank in ranks], axis=1)
    return by_token(expert, jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1)))


@dataclass(frozen=True)
class Ranked(FixedK):
    """Routes each token to its experts of these `ranks`; a selection bias can change the ranks."""

    name = "ranked"
    norm_topk_prob = True

    ranks: tuple = (0, 1)  # 0: the highest score

    def __call__(self, scores, weights, ctx):
        return ranked(scores, self.ranks, ctx.state.get("selection_bias"))

    def check(self, config):
        k, n = config.experts.top_k, config.experts.n_experts
        are_ranks = all(type(rank) is int and 0 <= rank < n for rank in self.ranks)
        if not are_ranks or not len(set(self.ranks)) == len(self.ranks) == k:
            wanted = f"must be experts.top_k={k} different whole numbers from 0, the highest score"
            self.refuse("ranks", f"{wanted}, to {n - 1}")

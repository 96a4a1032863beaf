"""Token choice by rank, for self-contrast: see `aoe_jax/evaluation/contrast.py`.

T tokens, n experts.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, by_token
from aoe_jax.experts.selection.base import Choice
from aoe_jax.experts.selection.top_k import TopK, best_experts


def ranked(scores, ranks, bias=None):
    """Token choice by rank: each token goes to the experts whose scores have these ranks, weighed
    by the softmax over them.

    Ranks from 0 to k - 1 are `top_k` of k with `gate="chosen"`; a single one has weight 1,
    whichever it is.

    Args:
      scores: `[T, n]` float32.
      ranks: different numbers from 0, the highest score, to n - 1; of equal scores the lower expert
        number comes first.
      bias: as in `top_k`.

    Returns:
      An `Assignment` with `P = T len(ranks)`.
    """
    by_rank = best_experts(scores, bias, max(ranks) + 1)
    expert = checkpoint_name(jnp.stack([by_rank[:, rank] for rank in ranks], axis=1), SELECTION)
    return by_token(expert, jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1)))


class Ranked(TopK):
    """`experts.selection="ranked"`, of the ranks `experts.ranks`; it has the state of top-k."""

    fields = ("top_k",)

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        return Choice(ranked(scores, experts.ranks, given.state.get("selection_bias")))

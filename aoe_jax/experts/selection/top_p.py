"""Token choice of uneven size: as many experts as it takes for their probability to pass p.

T tokens, n experts.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.selection.assignment import SELECTION, by_token
from aoe_jax.experts.selection.base import Choice, Selection


def top_p(scores, threshold):
    """Token choice of uneven size (Huang et al. 2024, arXiv 2403.07652): the most probable experts
    whose sum passes p.

    The expert that crosses the threshold is included. Weights are the softmax values themselves,
    not renormalised. `scores [T, n]` -> an `Assignment` with `P = T n`, most slots of it unused.
    """
    n_experts = scores.shape[1]
    probability = jax.nn.softmax(scores)
    values, expert = jax.lax.top_k(jax.lax.stop_gradient(probability), n_experts)
    chosen = jnp.cumsum(values, axis=1) - values <= threshold
    expert = checkpoint_name(jnp.where(chosen, expert, n_experts), SELECTION)
    weight = jnp.take_along_axis(probability, expert, axis=1, mode="fill", fill_value=0)
    return by_token(expert, weight)


class TopP(Selection):
    """`experts.selection="top_p"`."""

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        return Choice(top_p(scores, experts.top_p))

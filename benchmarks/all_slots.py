"""Top-k in the layout of selections that give a token any number of experts; what
`benchmarks.slots` times.
"""

import jax.numpy as jnp

from aoe_jax.experts.selection.assignment import by_mask
from aoe_jax.experts.selection.top_k import TopK


class AllSlots(TopK):
    """Top-k with a slot for every token and expert."""

    all_slots_used = False

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        choice = super().choose(experts, scores, given)
        slots = choice.assignment
        is_expert = slots.expert[:, None] == jnp.arange(experts.n_experts)
        weight = jnp.where(is_expert, slots.weight[:, None], 0)
        chosen, weight = (
            a.reshape(-1, experts.top_k, experts.n_experts).sum(axis=1) for a in (is_expert, weight)
        )
        return choice._replace(assignment=by_mask(chosen > 0, weight))

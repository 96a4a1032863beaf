"""The select station: from scores `[T, n]` (norms or logits, it doesn't matter which) to an `Assignment`.

A method is a file: pure functions of scores, and a `Selection` that says where its settings, state and losses come from.
"""

from aoe_jax.experts.selection.by_attention import ByAttention
from aoe_jax.experts.selection.expert_choice import ExpertChoice
from aoe_jax.experts.selection.gshard import GShard
from aoe_jax.experts.selection.threshold import Threshold
from aoe_jax.experts.selection.top_k import TopK
from aoe_jax.experts.selection.top_p import TopP

SELECTIONS = {
    "top_k": TopK(),
    "top_p": TopP(),
    "expert_choice": ExpertChoice(),
    "threshold": Threshold(),
    "gshard": GShard(),
    "by_attention": ByAttention(),
}

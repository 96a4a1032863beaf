"""The select station: from scores `[T, n]` (norms or logits, it doesn't matter which) to an
`Assignment`.

A method is a file: pure functions of scores, and a `Selection` that says where its settings, state
and losses come from.
"""

from aoe_jax.experts.selection.by_attention import ByAttention
from aoe_jax.experts.selection.expert_choice import ExpertChoice
from aoe_jax.experts.selection.gshard import GShard
from aoe_jax.experts.selection.ranked import Ranked
from aoe_jax.experts.selection.routing_free import RoutingFree
from aoe_jax.experts.selection.threshold import Threshold
from aoe_jax.experts.selection.top_any import TopAny
from aoe_jax.experts.selection.top_k import TopK
from aoe_jax.experts.selection.top_p import TopP

SELECTIONS = {
    "top_k": TopK(),
    "ranked": Ranked(),
    "top_p": TopP(),
    "expert_choice": ExpertChoice(),
    "threshold": Threshold(),
    "top_any": TopAny(),
    "routing_free": RoutingFree(),
    "gshard": GShard(),
    "by_attention": ByAttention(),
}

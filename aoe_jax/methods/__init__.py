"""The methods of the field beside AoE and the top-k router, one per file: settings, code, formula.

Each is a frozen dataclass that is registered here: a router, `(scores, weights, ctx) -> Routing`,
or a layer of its own, `(x, weights, layer, ctx) -> (y, LayerStats)`. Both inherit from `Method`
(`moe/routing.py`). A run has one of them as `config.routing`.
"""

from aoe_jax.methods.capacity import Capacity
from aoe_jax.methods.da_moe import DAMoE
from aoe_jax.methods.dense import Dense
from aoe_jax.methods.dynmoe import DynMoE
from aoe_jax.methods.erc import ERC
from aoe_jax.methods.gshard import GShard
from aoe_jax.methods.ranked import Ranked
from aoe_jax.methods.routing_free import RoutingFree
from aoe_jax.methods.sigmoid_top_k import SigmoidTopK
from aoe_jax.methods.smear import Smear
from aoe_jax.methods.sparsemixer import SparseMixer
from aoe_jax.methods.thor import Thor
from aoe_jax.methods.threshold import Threshold
from aoe_jax.methods.uoe import UoE
from aoe_jax.moe.routing import ExpertChoice, TopK, TopP

ROUTERS = {
    method.name: method
    for method in (
        TopK,
        TopP,
        ExpertChoice,
        Ranked,
        SparseMixer,
        SigmoidTopK,
        Threshold,
        DynMoE,
        RoutingFree,
        GShard,
        DAMoE,
        ERC,
    )
}
LAYERS = {method.name: method for method in (Dense, Capacity, UoE, Smear, Thor)}

"""Methods other than AoE and the top-k router of `moe/routing.py`. Each file describes one method.

A method is a frozen dataclass that inherits from `Method` (`moe/routing.py`). A router is called as
`(scores, weights, ctx) -> Routing`. A layer is called as `(x, weights, layer, ctx) ->
(y, LayerStats)`. A run uses one method, `config.routing`. `find_method` imports its class.
"""

from importlib import import_module

ROUTERS = {
    "top_k": "aoe_jax.moe.routing:TopK",
    "top_p": "aoe_jax.methods.top_p:TopP",
    "expert_choice": "aoe_jax.methods.expert_choice:ExpertChoice",
    "ranked": "aoe_jax.methods.ranked:Ranked",
    "sparsemixer": "aoe_jax.methods.sparsemixer:SparseMixer",
    "sigmoid_top_k": "aoe_jax.methods.sigmoid_top_k:SigmoidTopK",
    "threshold": "aoe_jax.methods.threshold:Threshold",
    "quantile": "aoe_jax.methods.quantile:Quantile",
    "dynmoe": "aoe_jax.methods.dynmoe:DynMoE",
    "routing_free": "aoe_jax.methods.routing_free:RoutingFree",
    "gshard": "aoe_jax.methods.gshard:GShard",
    "da_moe": "aoe_jax.methods.da_moe:DAMoE",
    "erc": "aoe_jax.methods.erc:ERC",
}
LAYERS = {
    "dense": "aoe_jax.methods.dense:Dense",
    "capacity": "aoe_jax.methods.capacity:Capacity",
    "uoe": "aoe_jax.methods.uoe:UoE",
    "smear": "aoe_jax.methods.smear:Smear",
    "thor": "aoe_jax.methods.thor:Thor",
}


def find_method(name: str):
    """Returns the class of a router or layer. Raises `KeyError` for an unknown name."""
    module, _, class_name = (ROUTERS | LAYERS)[name].partition(":")
    return getattr(import_module(module), class_name)


def all_methods():
    """Returns `{name: class}` of all methods."""
    return {name: find_method(name) for name in (*ROUTERS, *LAYERS)}

"""The declarations of all model parameters, and the sharding of a train state on a mesh."""

import re
from functools import cache

import jax
from jax.sharding import NamedSharding

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods import all_methods, find_method
from aoe_jax.parameters import (
    DECODER,
    EXPERTS,
    LARGE_ROUTER,
    ROUTER,
    SHARED_EXPERT,
    SHARED_SCALE,
    STACKS,
)
from aoe_jax.sharding import replicated, spec_of

_ANY = ExpertsConfig(kind="router")  # any kind, because splits do not depend on it


_OF_LAYERS = EXPERTS | LARGE_ROUTER | ROUTER | SHARED_EXPERT | SHARED_SCALE
# The parameters that are declared in `aoe_jax.parameters`, by path.
_COMMON = DECODER | {f"layers/experts/{name}": p for name, p in _OF_LAYERS.items()}


@cache
def declared(path):
    """The `Parameter` at a path in the tree of parameters; None if no model has one there."""
    path_in_layer = path.removeprefix("dense_")
    name = path_in_layer.removeprefix("layers/experts/")
    if path_in_layer != path:  # the dense layers before the layers of experts
        of_experts = find_method("dense")().parameters(_ANY)
        return of_experts.get(name, DECODER.get(path_in_layer))
    if path in _COMMON:
        return _COMMON[path]
    of_methods = (method().parameters(_ANY) for method in all_methods().values())
    return next((found[name] for found in of_methods if name in found), None)


def state_shardings(mesh, abstract_state):
    """The shardings of a train state with the shapes of `abstract_state`.

    Parameters and the optimiser's moments are split as their `Parameter` says; everything else is
    replicated. Raises `ValueError` for a parameter that is not declared.
    """

    def sharding(path, a):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names and names[0] in ("muon", "adam"):  # `optax.contrib.muon` has a state for each
            del names[0]
        if not names or jax.tree_util.GetAttrKey("routing_state") in path:
            return replicated(mesh)
        name = re.sub(r"layer_\d+", "layers", "/".join(names))
        if not declared(name):
            raise ValueError(f"parameter {name} is not declared in aoe_jax.parameters or a method")
        is_stacked = names[0] in STACKS
        split = declared(name).split[-(a.ndim - is_stacked) :] if a.ndim > is_stacked else ()
        return NamedSharding(mesh, spec_of(*((None,) * is_stacked), *split))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)

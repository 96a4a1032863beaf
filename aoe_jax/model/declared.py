"""All parameters that models have, and how a train state is split over the mesh."""

import re
from functools import cache

import jax
from jax.sharding import NamedSharding

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods import all_methods
from aoe_jax.methods.dense import Dense
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

_ANY = ExpertsConfig(kind="router")  # no declaration depends on it


@cache
def _common():
    """The parameters by path that need no method: decoder, dense layers, experts and routers."""
    of_layers = EXPERTS | LARGE_ROUTER | ROUTER | SHARED_EXPERT | SHARED_SCALE
    found = DECODER | {f"layers/experts/{name}": p for name, p in of_layers.items()}
    dense = {f"layers/experts/{name}": p for name, p in Dense().parameters(_ANY).items()}
    of_dense = {path: p for path, p in (DECODER | dense).items() if path.startswith("layers/")}
    return found | {f"dense_{path}": p for path, p in of_dense.items()}


@cache
def declared(path):
    """The `Parameter` at a path in the tree of parameters; None if no model has one there."""
    if path in _common():
        return _common()[path]
    name = path.removeprefix("layers/experts/")
    of_methods = (method().parameters(_ANY) for method in all_methods().values())
    return next((found[name] for found in of_methods if name in found), None)


def state_shardings(mesh, abstract_state):
    """The shardings of a train state with the shapes of `abstract_state`.

    Parameters and the optimiser's moments are split as `declared`; everything else is replicated.
    Raises `ValueError` for a parameter that is not declared.
    """

    def sharding(path, a):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names or jax.tree_util.GetAttrKey("routing_state") in path:
            return replicated(mesh)
        name = re.sub(r"layer_\d+", "layers", "/".join(names))
        if not declared(name):
            raise ValueError(f"parameter {name} is not declared in aoe_jax.parameters or a method")
        is_stacked = names[0] in STACKS
        split = declared(name).split[-(a.ndim - is_stacked) :] if a.ndim > is_stacked else ()
        return NamedSharding(mesh, spec_of(*((None,) * is_stacked), *split))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)

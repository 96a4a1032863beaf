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


@cache
def declared_parameters():
    """Every parameter that any model has, by its path in the tree of parameters."""
    experts, of_layers = ExpertsConfig(kind="router"), {}
    for method in all_methods().values():
        of_layers |= method().parameters(experts)
    of_layers |= LARGE_ROUTER | ROUTER | EXPERTS | SHARED_EXPERT | SHARED_SCALE
    found = DECODER | {f"layers/experts/{name}": p for name, p in of_layers.items()}
    dense = {f"layers/experts/{name}": p for name, p in Dense().parameters(experts).items()}
    of_dense = {path: p for path, p in (DECODER | dense).items() if path.startswith("layers/")}
    return found | {f"dense_{path}": p for path, p in of_dense.items()}


def state_shardings(mesh, abstract_state):
    """The shardings of a train state, of which `abstract_state` has the shapes.

    Parameters are split as they are declared (`declared_parameters`), and the optimiser's
    copies like them. All else, such as counters and the state of routing, is replicated. Raises
    `ValueError` for a parameter that is not declared.
    """
    declared = declared_parameters()

    def sharding(path, a):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names or jax.tree_util.GetAttrKey("routing_state") in path:
            return replicated(mesh)
        name = re.sub(r"layer_\d+", "layers", "/".join(names))
        if name not in declared:
            raise ValueError(f"parameter {name} is not declared in aoe_jax.parameters or a method")
        is_stacked = names[0] in STACKS
        split = declared[name].split[-(a.ndim - is_stacked) :] if a.ndim > is_stacked else ()
        return NamedSharding(mesh, spec_of(*((None,) * is_stacked), *split))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)

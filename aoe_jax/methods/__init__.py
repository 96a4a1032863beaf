"""Methods other than AoE and the top-k router of `moe/routing.py`. Each file describes one method.

A method is a frozen dataclass that inherits from `Method` (`moe/routing.py`). A router is called as
`(scores, weights, ctx) -> Routing`. A layer is called as `(x, weights, layer, ctx) ->
(y, LayerStats)`. A run uses one method, `config.routing`. `find_method` imports its class.
"""

import os
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from aoe_jax.config.checks import absolute_path, did_you_mean, require, require_choice
from aoe_jax.errors import running
from aoe_jax.moe.routing import Method

ROUTERS = {
    "top_k": "aoe_jax.moe.routing:TopK",
    "top_p": "aoe_jax.methods.top_p:TopP",
    "expert_choice": "aoe_jax.methods.expert_choice:ExpertChoice",
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
_PACKAGE = Path(__file__).parents[1]
_OF_FILES = {}  # the classes that were read from files, by name


def find_method(name: str):
    """Returns the class of a router or layer. `name` is a key of `ROUTERS` or `LAYERS`, or
    `FILE.py:CLASS` for a router in a Python file. A relative path that does not exist here is one
    in the package. Raises `UserError`.
    """
    known = ROUTERS | LAYERS
    if is_in_file(name):
        if name not in _OF_FILES:
            _OF_FILES[name] = _method_of_file(name)
        return _OF_FILES[name]
    require_choice("routing.name", name, (*known, "FILE.py:CLASS"))
    module, _, class_name = known[name].partition(":")
    return getattr(import_module(module), class_name)


def is_in_file(name):
    """Whether a name means a class in a Python file."""
    return isinstance(name, str) and ".py:" in name


def _method_of_file(name):
    path, _, class_name = name.rpartition(":")
    file = absolute_path(path)
    if not os.path.isfile(file) and os.path.isfile(of_package := _PACKAGE / path):
        file = of_package  # such as configs/compare/scores.py outside the repository
    require(os.path.isfile(file), "routing.name", name, f"there is no file {file}")
    # A dataclass looks its module up, so the module needs a name that no other module has.
    spec = spec_from_file_location(str(file), file)
    module = sys.modules[spec.name] = module_from_spec(spec)
    with running(f"config.routing.name={name!r}", file, path):
        spec.loader.exec_module(module)
    method = vars(module).get(class_name)
    is_own = isinstance(method, type) and method.__module__ == spec.name
    is_router = is_own and issubclass(method, Method) and "__dataclass_fields__" in vars(method)
    wanted = f"{path} has no dataclass {class_name} that inherits from aoe_jax.moe.routing.Method"
    wanted += did_you_mean(class_name, vars(module))
    require(is_router, "routing.name", name, wanted)
    is_called = any("__call__" in vars(of) for of in method.__mro__)
    require(is_called, "routing.name", name, f"{class_name} needs `__call__(scores, weights, ctx)`")
    for field in fields(method):
        has_default = (field.default, field.default_factory) != (MISSING, MISSING)
        require(has_default, "routing.name", name, f"its field {field.name} needs a default")
    method.name = name
    return method


def all_methods():
    """Returns `{name: class}` of the files that were read and of this package."""
    return {name: find_method(name) for name in (*_OF_FILES, *ROUTERS, *LAYERS)}

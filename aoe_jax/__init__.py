"""Autonomy-of-Experts language models (arXiv 2501.13074) in JAX and Flax.

`__all__` is the public interface, see docs/library.md. Its names are imported when they are first
used, because preparing data needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aoe_jax.layers import AoE, Aux, MoE
    from aoe_jax.methods.dense import DenseLayer
    from aoe_jax.model.attention import causal_attention
    from aoe_jax.model.decoder import Decoder
    from aoe_jax.moe.grouped_matmul import grouped_matmul
    from aoe_jax.moe.layer import AoELayer, ExpertsLayer, RouterLayer

__all__ = [
    "AoE",
    "AoELayer",
    "Aux",
    "Decoder",
    "DenseLayer",
    "ExpertsLayer",
    "MoE",
    "RouterLayer",
    "causal_attention",
    "grouped_matmul",
]
_HOMES = {
    "AoE": "layers",
    "AoELayer": "moe.layer",
    "Aux": "layers",
    "Decoder": "model.decoder",
    "DenseLayer": "methods.dense",
    "ExpertsLayer": "moe.layer",
    "MoE": "layers",
    "RouterLayer": "moe.layer",
    "causal_attention": "model.attention",
    "grouped_matmul": "moe.grouped_matmul",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__

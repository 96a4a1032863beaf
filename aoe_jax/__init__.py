"""Autonomy-of-Experts language models (arXiv 2501.13074) in JAX and Flax."""

import importlib

_HOMES = {
    "AoELayer": "aoe_jax.moe.layer",
    "Decoder": "aoe_jax.model.decoder",
    "DenseLayer": "aoe_jax.methods.dense",
    "ExpertsLayer": "aoe_jax.moe.layer",
    "RouterLayer": "aoe_jax.moe.layer",
}
__all__ = list(_HOMES)


def __getattr__(name):
    """Imports JAX only once it is needed: preparing data needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

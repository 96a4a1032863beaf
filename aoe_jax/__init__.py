"""Autonomy-of-Experts language models (arXiv 2501.13074) in JAX and Flax."""

from aoe_jax.experts.layer import AoELayer, DenseLayer, RouterLayer
from aoe_jax.model.decoder import Decoder

__all__ = ["AoELayer", "Decoder", "DenseLayer", "RouterLayer"]

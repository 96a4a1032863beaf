"""Autonomy-of-Experts language models (arXiv 2501.13074) in JAX and Flax.

`__all__` is the public interface, see docs/reference/layer_details.md. Its names are imported when
they are first used, so that data preparation does not import JAX.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
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

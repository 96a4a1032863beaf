"""Parameters of layers to test with: drawing them compiles a program, so those that are alike are
drawn once.
"""

from functools import cache

import jax
import jax.numpy as jnp

from aoe_jax.moe.layer import ExpertsLayer


def parameters_of(layer, x, seed=1):
    """What `layer.init` draws for tokens `x`, in their dtype."""
    x64 = jax.config.jax_enable_x64  # which decides what numbers are drawn as
    drawn = _drawn(layer.experts, layer.routing, x.shape, x.dtype, seed, x64)
    return jax.tree.map(lambda a: a.astype(x.dtype), drawn)


@cache
def _drawn(experts, routing, shape, dtype, seed, x64):
    layer = ExpertsLayer(experts, routing)
    peaks = jnp.zeros((*shape[:-1], 2)) if routing.needs_attention_peaks else None

    def init(key, x):
        return layer.init(key, x, attention_peaks=peaks)["params"]

    return jax.jit(init)(jax.random.key(seed), jnp.zeros(shape, dtype))

"""Parameters of layers to test with, drawn without compiling a program where that is possible."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.parameters import EXPERTS, LARGE_ROUTER, ROUTER, SHARED_EXPERT, SHARED_SCALE

MATRICES = EXPERTS | ROUTER | LARGE_ROUTER | SHARED_EXPERT | SHARED_SCALE


def parameters_of(layer, x, seed=1):
    """Parameters for tokens `x`, in their dtype, distributed like those that `layer.init` draws."""
    x64 = jax.config.jax_enable_x64  # which decides what numbers are drawn as
    drawn = _drawn(layer.experts, layer.routing, x.shape, x.dtype, seed, x64)
    return jax.tree.map(lambda a: jnp.asarray(a, x.dtype), drawn)


@cache
def _drawn(experts, routing, shape, dtype, seed, x64):
    layer = ExpertsLayer(experts, routing)
    captured = jnp.zeros((*shape[:-1], 2)) if routing.hooks.attention else None

    def init(key, x):
        return layer.init(key, x, captured=captured)["params"]

    arguments = jax.random.key(seed), jnp.zeros(shape, dtype)
    shapes, chance = jax.eval_shape(init, *arguments), np.random.default_rng(seed)
    if not shapes.keys() <= MATRICES.keys():
        return jax.jit(init)(*arguments)
    return {
        name: chance.standard_normal(a.shape) / np.sqrt(a.shape[-2]) for name, a in shapes.items()
    }

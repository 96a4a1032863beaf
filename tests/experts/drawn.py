"""Parameters of layers to test with: drawing them compiles a program, so those that are alike are
drawn once.
"""

from functools import cache

import jax
import jax.numpy as jnp


def parameters_of(layer, x, seed=1):
    """What `layer.init` draws for tokens `x`, in their dtype."""
    drawn = _drawn(
        type(layer), layer.config, layer.settings, x.shape, x.dtype, seed, jax.config.jax_enable_x64
    )
    return jax.tree.map(lambda a: a.astype(x.dtype), drawn)


@cache
def _drawn(
    kind, config, settings, shape, dtype, seed, x64
):  # which decides what numbers are drawn as
    layer = kind(config, settings=settings)
    init = jax.jit(lambda key, x: layer.init(key, x)["params"])  # the layer itself is not computed
    return init(jax.random.key(seed), jnp.zeros(shape, dtype))

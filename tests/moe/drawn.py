"""Random parameters of layers, without a program that draws them."""

import jax.numpy as jnp
import numpy as np

from aoe_jax.moe import layer as moe_layer


def parameters_of(layer, x, seed=1):
    """Parameters for tokens `x`, in their dtype. Matrices have the variance of `layer.init`, and
    vectors, which `layer.init` would set to constants, a standard deviation of 0.1.
    """
    draw, sizes = np.random.default_rng(seed).standard_normal, layer.experts.sizes(x.shape[-1])
    declared = moe_layer.parameters_of(layer.experts, layer.routing)
    shapes = {name: parameter.shape(sizes) for name, parameter in sorted(declared.items())}
    return {
        name: jnp.asarray(draw(shape) * (shape[-2] ** -0.5 if len(shape) > 1 else 0.1), x.dtype)
        for name, shape in shapes.items()
    }

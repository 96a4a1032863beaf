"""Helpers that compile attention, grouped products and stacked layers for devices that this machine
lacks.

Shapes are those of a grouped product: M rows, contracted width D, output width F, E experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, make_single_device_sharding

from aoe_jax.config.run import Config
from aoe_jax.model.attention import causal_attention
from aoe_jax.model.decoder import RMSNorm
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.planning import kernel_checks
from aoe_jax.planning.hardware import CHIPS, topology_devices
from aoe_jax.planning.hlo import compile_and_read
from aoe_jax.sharding import fill_mesh, make_mesh, replicated
from benchmarks.timing import check_names
from configs import paper, tiny

# The smallest topology that the compiler accepts for each TPU generation.
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
TOPOLOGIES = {generation: TPUS.get(generation, f"{generation}:1") for generation in CHIPS}

PRODUCTS = ("forward", "d_rows", "d_weights")


def devices_of(generation):
    """Returns the devices of the smallest topology of a generation, for compilation only."""
    check_names("generations", [generation], TOPOLOGIES)
    return topology_devices(TOPOLOGIES[generation])[1]


def compiled_attention(devices, backend, shape):
    """Compiles attention and its gradients in bfloat16 for the first device. `shape` is (sequences,
    query heads, key and value heads, positions, head width). Returns `(program, text of its HLO)`.
    """
    b, n_heads, n_kv, s, h = shape
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    *arrays, g = (
        jax.ShapeDtypeStruct((b, n, s, h), jnp.bfloat16, sharding=replicated(mesh))
        for n in (n_heads, n_kv, n_kv, n_heads)
    )
    function = kernel_checks.with_gradients(partial(causal_attention, backend=backend))
    with jax.set_mesh(mesh):
        return compile_and_read(kernel_checks.everywhere(mesh, function).lower(arrays, g, ()))


def expert_shapes():
    """Returns the sorted `(D, F)` of all grouped products in configs/tiny.py and paper.py."""
    shapes = set()
    for module in (tiny, paper):
        for variant in module.VARIANTS:
            config = Config.from_config_dict(module.get_config(variant))
            shapes |= {shape[1:] for shape in kernel_checks.expert_shapes(config).values()}
    return sorted(shapes)


def lower_for(device, backend, m, d, f, n_experts, dtype, product=None):
    """Lowers the grouped product `[M, D] x [E, D, F]` and its two gradients for a device of a
    topology. With `product`, a name in `PRODUCTS`, it lowers only this one of the three.
    """
    here = make_single_device_sharding(device)

    def value_and_gradients(rows, weights, group_sizes, g):
        forward = partial(grouped_matmul, backend=backend)
        if product == "forward":  # some backends have no gradient
            return forward(rows, weights, group_sizes)
        found = kernel_checks.with_gradients(forward)((rows, weights), g, (group_sizes,))
        return found[PRODUCTS.index(product)] if product else found

    shapes = [
        ((m, d), dtype),
        ((n_experts, d, f), dtype),
        ((n_experts,), jnp.int32),
        ((m, f), dtype),
    ]
    return jax.jit(value_and_gradients).lower(
        *(jax.ShapeDtypeStruct(*s, sharding=here) for s in shapes)
    )


def experts_layer(config: Config):
    """Returns the `ExpertsLayer` of a configuration, in its dtype."""
    return ExpertsLayer(
        experts=config.experts,
        routing=config.routing,
        balance=config.balance,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
    )


def lower_layers(device, config: Config, n_tokens):
    """Lowers, for one device of a topology, the gradient of a loss with respect to the parameters
    and tokens of `n_layers` scanned layers of experts.

    A layer is `x + experts(RMSNorm(x))` in `model.dtype` with float32 parameters and no
    rematerialisation. The loss is the mean square of the output, without balance losses.
    """
    m, dtype, layer = config.model, jnp.dtype(config.model.dtype), experts_layer(config)
    norm = RMSNorm(dtype=dtype, use_scale=False)

    def block(x, params):
        return x + layer.apply({"params": params}, norm.apply({}, x))[0], None

    def loss(params, x):
        return (jax.lax.scan(block, x, params)[0].astype(jnp.float32) ** 2).mean()

    mesh = make_mesh(fill_mesh(config, 1), [device])
    here = replicated(mesh)
    x = jax.ShapeDtypeStruct((n_tokens, m.d_model), dtype, sharding=here)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, m.d_model)))["params"]
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((m.n_layers, *a.shape), a.dtype, sharding=here), params
    )
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1)), out_shardings=here).lower(params, x)

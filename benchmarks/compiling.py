"""What the compile checks share: grouped products and stacked layers, lowered for a device that
isn't here.

M rows, D contracted width, F output width, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from aoe_jax.config import Config
from aoe_jax.errors import UserError
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.grouped_matmul.megablox import tiles
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection.assignment import SELECTION
from aoe_jax.model.decoder import RMSNorm
from aoe_jax.sharding import MESH_AXES
from aoe_jax.topology import topology_devices
from configs import paper, tiny

# The smallest topology of each TPU generation that the compiler knows.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}


def tpu_devices(generation):
    """Devices of a TPU that needn't be here; `libtpu` must."""
    if generation not in TOPOLOGIES:
        raise UserError(f"--generations={generation} is unknown; choose of {', '.join(TOPOLOGIES)}")
    return topology_devices(TOPOLOGIES[generation])[1]


def expert_shapes():
    """The sorted `(D, F)` of every grouped product in configs/tiny.py and configs/paper.py."""
    shapes = set()
    for module in (tiny, paper):
        for variant in module.VARIANTS:
            config = Config.from_config_dict(module.get_config(variant))
            experts, d = config.experts, config.model.d_model
            if experts.kind != "dense":
                width = experts.width(d)
                shapes |= {(d, width), (width, d)}
                shapes |= (
                    {(d, experts.d_low), (experts.d_low, width)} if experts.low_rank else set()
                )
    return sorted(shapes)


def lower_for(device, backend, m, d, f, n_experts, dtype):
    """The product `[M, D] x [E, D, F]` and its two gradients for a device of a topology: a
    `jax.stages.Lowered`.
    """
    here = SingleDeviceSharding(device)

    def value_and_gradients(rows, weights, group_sizes, g):
        value, pull_back = jax.vjp(
            lambda r, w: grouped_matmul(r, w, group_sizes, backend=backend), rows, weights
        )
        return value, *pull_back(g)

    shapes = [
        ((m, d), dtype),
        ((n_experts, d, f), dtype),
        ((n_experts,), jnp.int32),
        ((m, f), dtype),
    ]
    return jax.jit(value_and_gradients).lower(
        *(jax.ShapeDtypeStruct(*s, sharding=here) for s in shapes)
    )


def megablox_tile_flops(m, d, f, n_experts, itemsize):
    """FLOPs of whole tiles over the useful `6 M D F`, where every group ends within a tile,
    computed for both its groups.
    """
    total = 0
    for name, (tm, tk, tn) in tiles(m, d, f, n_experts, itemsize).items():
        k, n = (f, d) if name == "d_rows" else (d, f)
        total += 2 * (-(-m // tm) + n_experts - 1) * tm * (-(-k // tk) * tk) * (-(-n // tn) * tn)
    return total / (6 * m * d * f)


def compile_layers(device, config: Config, n_tokens):
    """The gradient of `n_layers` scanned layers of experts, in parameters and tokens, compiled for
    one device of a topology.

    Each is `x + experts(RMSNorm(x))`, in `model.dtype` over float32 parameters, with `model.remat`
    and the balance loss.
    """
    m, dtype = config.model, jnp.dtype(config.model.dtype)
    layer = LAYERS[config.experts.kind](
        config.experts, dtype, config.balance, recompute=m.remat == "experts"
    )
    norm = RMSNorm(dtype=dtype, use_scale=False)

    def block(x, params):
        y, stats = layer.apply({"params": params}, norm.apply({}, x))
        return x + y, (
            stats.load * stats.mean_probability
        ).sum() if config.balance.has_loss else 0.0

    if m.remat == "layer":
        policy = jax.checkpoint_policies.save_only_these_names(SELECTION)
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)

    def loss(params, x):
        y, aux_losses = jax.lax.scan(block, x, params)
        return (y.astype(jnp.float32) ** 2).mean() + jnp.sum(aux_losses)

    mesh = Mesh(np.full((1, 1, 1, 1), device), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    here = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((n_tokens, m.d_model), dtype, sharding=here)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, m.d_model)))["params"]
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((m.n_layers, *a.shape), a.dtype, sharding=here), params
    )
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1)), out_shardings=here).lower(params, x).compile()

"""What the compile checks share: the grouped products of the configurations, lowered for a device that isn't here.

M rows, D contracted width, F output width, E experts.
"""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from aoe_jax.config import Config
from aoe_jax.experts.grouped_matmul import grouped_matmul
from aoe_jax.experts.grouped_matmul.megablox import tiles
from configs import paper, tiny


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
                shapes |= {(d, experts.d_low), (experts.d_low, width)} if experts.low_rank else set()
    return sorted(shapes)


def lower_for(device, backend, m, d, f, n_experts, dtype):
    """The product `[M, D] x [E, D, F]` and its two gradients for a device of a topology: a `jax.stages.Lowered`."""
    here = SingleDeviceSharding(device)

    def value_and_gradients(rows, weights, group_sizes, g):
        value, pull_back = jax.vjp(lambda r, w: grouped_matmul(r, w, group_sizes, backend=backend), rows, weights)
        return value, *pull_back(g)

    shapes = [((m, d), dtype), ((n_experts, d, f), dtype), ((n_experts,), jnp.int32), ((m, f), dtype)]
    return jax.jit(value_and_gradients).lower(*(jax.ShapeDtypeStruct(*s, sharding=here) for s in shapes))


def megablox_tile_flops(m, d, f, n_experts, itemsize):
    """FLOPs of whole tiles over the useful `6 M D F`, where every group ends within a tile, computed for both its groups."""
    total = 0
    for name, (tm, tk, tn) in tiles(m, d, f, n_experts, itemsize).items():
        k, n = (f, d) if name == "d_rows" else (d, f)
        total += 2 * (-(-m // tm) + n_experts - 1) * tm * (-(-k // tk) * tk) * (-(-n // tn) * tn)
    return total / (6 * m * d * f)

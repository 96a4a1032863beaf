"""Grouped products compiled for TPUs that are absent, forward and backward, with `libtpu` from its
wheel.

`python -m benchmarks.grouped_compile --shapes=all` compiles every shape for every generation; here
every shape is compiled for one.
"""

import math
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.model.counts import layer_flops_per_token
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.parallel.collectives import sum_gradients
from aoe_jax.planning import costs, hlo
from aoe_jax.planning.hardware import topology_devices
from aoe_jax.sharding import fill_mesh, make_mesh
from benchmarks.compiling import (
    TPUS,
    devices_of,
    expert_shapes,
    lower_for,
    lower_layers,
    megablox_tile_flops,
)
from configs import paper

pytestmark = pytest.mark.slow


def kernels_and_dense_products(lowered):
    # Of the program as lowered: jaxlib cannot always print what a newer libtpu has compiled.
    text = lowered.as_text()
    return text.count("@tpu_custom_call"), text.count("stablehlo.dot_general")


@pytest.mark.parametrize("n_experts", [64, 8])
def test_tiles_compute_little_more_than_is_useful(n_experts):
    assert megablox_tile_flops(131072, 768, 3840, n_experts, 2) <= 1.10


EVERY_SHAPE = list(
    zip(expert_shapes(), cycle(TPUS), cycle(["float32", "bfloat16"]), cycle([32768, 131072, 96]))
)


@pytest.mark.parametrize(("shape", "generation", "dtype", "m"), EVERY_SHAPE)
def test_every_shape_compiles(shape, generation, dtype, m):
    """To three kernels and no other product; the compiler counts a kernel at the FLOPs it
    declares.
    """
    lowered = lower_for(
        devices_of(generation)[0], "megablox", m, *shape, 64 if m > 32768 else 8, dtype
    )
    assert kernels_and_dense_products(lowered) == (3, 0)
    assert lowered.compile().cost_analysis()["flops"] <= 1.10 * 6 * m * shape[0] * shape[1]


EIGHT, SIXTY_FOUR = (8, 2, 3072, 256), (64, 8, 768, 512)  # n_experts, top_k, d_ffn, d_low
LAYERS = [  # and the GB of traffic that two layers take at most, forward and backward
    ("aoe", "v4", SIXTY_FOUR, None, 13.5),
    ("aoe", "v5p", EIGHT, 16, 7.3),
    ("router", "v5e", EIGHT, None, 5.5),
]


@pytest.mark.parametrize(("kind", "generation", "shape", "score_neurons", "traffic"), LAYERS)
def test_work_of_a_layer(kind, generation, shape, score_neurons, traffic):
    """Loss-free; no expert is computed but the chosen, whose norms are computed twice, and no array
    has the hidden width of all experts for all tokens. The neurons of whole gates that score cost
    no pass over their gates.
    """
    n_tokens, (n_experts, top_k, d_ffn, d_low) = 4096, shape
    experts = ExpertsConfig(
        kind, n_experts, top_k, d_ffn=d_ffn, d_low=d_low, score_neurons=score_neurons
    )
    config = Config(
        model=ModelConfig(n_layers=2, n_heads=1, d_model=768),
        experts=experts,
        balance=BalanceConfig(aux_weight=0.0),
    )
    lowered = lower_layers(devices_of(generation)[0], config, n_tokens)
    compiled, text = hlo.compile_and_read(lowered)
    # The compiler counts the body of the scan once, that is one layer.
    ratio = compiled.cost_analysis()["flops"] / (n_tokens * layer_flops_per_token(config))
    assert 0.95 < ratio <= 1.10
    program = costs.Program(text)
    sizes, n_layers = config.experts.sizes(config.model.d_model), config.model.n_layers
    scored = n_tokens * n_experts * sizes["r"] if kind == "aoe" else 0
    instructions = (i for part in program.computations.values() for i in part.values())
    largest = max(math.prod(a.dims) for i in instructions for a in i.arrays)
    kept = n_layers * n_tokens * top_k * sizes["f"]
    assert largest <= max(scored, kept) < n_tokens * n_experts * sizes["f"]
    operations = program.operations
    assert sum(o.times * o.hbm_bytes for o in operations) <= 1e9 * traffic
    if score_neurons:
        scoring = sum(o.times * o.hbm_bytes for o in operations if "row_scores" in o.op_name)
        assert 0 < scoring < kept  # half of the bytes of all gates


@pytest.mark.smoke
def test_the_mesh_chooses_the_backend():
    """No argument is needed: on a CPU host, a program for a TPU mesh gets the TPU kernel, inside
    scan and remat too.
    """
    mesh = jax.sharding.Mesh(np.array(devices_of("v5e")), ("data",))
    spec = jax.sharding.PartitionSpec

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec("data"), spec(), spec()),
        out_specs=spec("data"),
        check_vma=False,
    )
    def gradient(rows, weights, group_sizes):
        def loss(rows):
            layer = jax.checkpoint(lambda x, w: (jnp.tanh(grouped_matmul(x, w, group_sizes)), None))
            return jax.lax.scan(layer, rows, weights)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(rows)

    shapes = [((4 * 256, 128), spec("data")), ((3, 8, 128, 128), spec())]
    args = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, p))
        for s, p in shapes
    ]
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, spec()))
    lowered = jax.jit(gradient).lower(*args, sizes)
    assert kernels_and_dense_products(lowered)[0] >= 2
    lowered.compile()


# The meshes of docs/plans.md.
MESHES = [
    ("v5e:4x4", 16),
    ("v5e:16x16", 16),
    ("v5p:4x4x4", 64),
    ("v5p:4x4x4", 16),
    ("v5p:8x8x8", 64),
    ("v6e:4x4", 16),
    ("tpu7x:2x2x4", 32),
]


@pytest.mark.parametrize(("topology", "fsdp"), MESHES)
def test_gradients_are_summed_by_native_reduce_scatters(topology, fsdp):
    """Each device sends what a single one would; an all-reduce sends twice the bytes."""
    devices = topology_devices(topology)[1]
    config = paper.get_config("moe_aux")
    config.mesh.fsdp = fsdp
    config = fill_mesh(Config.from_config_dict(config), len(devices))
    mesh = make_mesh(config, devices)
    sums = jax.shard_map(
        lambda g: sum_gradients(g, "fsdp", 1),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, "fsdp"),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    g = jax.ShapeDtypeStruct((8, 3072, 768), jnp.float32, sharding=everywhere)
    with jax.set_mesh(mesh):
        _, text = hlo.compile_and_read(jax.jit(sums).lower(g))
    found = [o for o in costs.Program(text).operations if o.collective]
    assert {o.collective for o in found} == {"reduce-scatter"}
    assert math.prod(o.group_size for o in found) == fsdp
    sent = sum(o.sent_bytes * (1 - 1 / o.group_size) for o in found)
    assert sent == pytest.approx(4 * g.size * (1 - 1 / fsdp), rel=1e-3)

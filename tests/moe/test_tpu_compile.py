"""Grouped products compiled for TPUs that are absent, forward and backward, with `libtpu` from its
wheel.

`python -m benchmarks.grouped_compile --shapes=all` compiles every shape for every generation; here
every shape, or the one with D and F exchanged, is compiled for one.
"""

import math
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, make_single_device_sharding

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.model.counts import layer_flops_per_token
from aoe_jax.moe.collectives import gather_in_stages, sum_gradients
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.swiglu import gate_pre_activations, swiglu
from aoe_jax.planning import costs, hlo
from aoe_jax.planning.hardware import compiling_for, topology_devices
from aoe_jax.sharding import fill_mesh, make_mesh
from benchmarks.compiling import TPUS, devices_of, expert_shapes, lower_for, lower_layers
from configs import paper

pytestmark = pytest.mark.slow


def kernels_and_dense_products(lowered):
    # The lowered program: jaxlib cannot always print programs that a newer libtpu has compiled.
    text = lowered.as_text()
    return text.count("@tpu_custom_call"), text.count("stablehlo.dot_general")


# Products of (F, D) have the tiles of those of (D, F), mirrored, so one of the two is compiled.
EVERY_SHAPE = [(d, f) for d, f in expert_shapes() if d <= f or (f, d) not in expert_shapes()]
EVERY_SHAPE = list(
    zip(EVERY_SHAPE, cycle(TPUS), cycle(["float32", "bfloat16"]), cycle([32768, 131072, 96]))
)


@pytest.mark.parametrize(("shape", "generation", "dtype", "m"), EVERY_SHAPE)
def test_every_shape_compiles(shape, generation, dtype, m):
    """There are three kernels and no other product. A kernel declares its FLOPs itself."""
    lowered = lower_for(
        devices_of(generation)[0], "megablox", m, *shape, 64 if m > 32768 else 8, dtype
    )
    assert kernels_and_dense_products(lowered) == (3, 0)
    assert lowered.compile().cost_analysis()["flops"] <= 1.10 * 6 * m * shape[0] * shape[1]


WIDTHS = [(1280, 6470), (4096, 14336), (2880, 2880)]  # d, f
SHAPES = [(32768, *widths) for widths in WIDTHS] + [(40, 768, 3072)]


@pytest.mark.parametrize(("shape", "generation"), list(zip(SHAPES, cycle(TPUS), strict=False)))
def test_swiglu_compiles(shape, generation):
    """The kernels of `megablox_swiglu` fit in the VMEM, also with a remainder of d."""
    (m, d, f), n_experts = shape, 8
    own = make_single_device_sharding(devices_of(generation)[0])

    def shape(*dims, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=own)

    def value_and_gradients(rows, weight, groups, w, g):
        def value(rows, weight, w):
            gate, _, rows = gate_pre_activations(rows, groups, w, backend="megablox")
            return swiglu(rows, gate, weight, groups, w, "megablox")

        y, pull_back = jax.vjp(value, rows, weight, w)
        return y, pull_back(g)

    groups, w = shape(n_experts, dtype="int32"), {"w_down": shape(n_experts, f, d)}
    w |= {name: shape(n_experts, d, f) for name in ("w_gate", "w_up")}
    arguments = shape(m, d), shape(m, dtype="float32"), groups, w, shape(m, d)
    lowered = jax.jit(value_and_gradients).lower(*arguments)
    assert kernels_and_dense_products(lowered)[1] == 0
    lowered.compile()


EIGHT, SIXTY_FOUR = (8, 2, 3072, 256), (64, 8, 768, 512)  # n_experts, top_k, d_ffn, d_low
LAYERS = [  # and the GB of traffic that two layers take at most, forward and backward
    ("v4", SIXTY_FOUR, None, 13.5),
    ("v5p", EIGHT, 16, 7.3),
]


@pytest.mark.parametrize(("generation", "shape", "score_neurons", "traffic"), LAYERS)
def test_work_of_a_layer(generation, shape, score_neurons, traffic):
    """Only chosen experts are computed, and their norms twice; no array has the hidden width of all
    experts for all tokens. Reading the scoring neurons of whole gates does not read the gates.
    """
    n_tokens, (n_experts, top_k, d_ffn, d_low) = 4096, shape
    experts = ExpertsConfig(
        "aoe", n_experts, top_k, d_ffn=d_ffn, d_low=d_low, score_neurons=score_neurons
    )
    config = Config(
        model=ModelConfig(n_layers=2, n_heads=1, d_model=768, dtype="bfloat16"),
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
    scored = n_tokens * n_experts * sizes["r"]
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
    """On a CPU host a program for a TPU mesh uses the TPU kernel, also inside scan and remat."""
    mesh = jax.sharding.Mesh(np.array(devices_of("v5e")), ("data",))
    specs = PartitionSpec("data"), PartitionSpec(), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    def gradient(rows, weights, group_sizes):
        def loss(rows):
            layer = jax.checkpoint(lambda x, w: (jnp.tanh(grouped_matmul(x, w, group_sizes)), None))
            return jax.lax.scan(layer, rows, weights)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(rows)

    shapes = ((4 * 256, 128), "bfloat16"), ((3, 8, 128, 128), "bfloat16"), ((8,), "int32")
    args = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    lowered = jax.jit(gradient).lower(*args)
    assert kernels_and_dense_products(lowered)[0] >= 2
    lowered.compile()


# The meshes of docs/plans.md, and larger ones.
MESHES = [
    ("v5e:4x4", 16),
    ("v5e:16x16", 16),
    ("v5p:4x4x4", 64),
    ("v5p:4x4x4", 16),
    ("v5p:8x8x8", 64),
    ("v6e:4x4", 16),
    ("tpu7x:2x2x4", 32),
    ("v5e:4x8", 32),
    ("v6e:16x16", 256),
    ("v5p:2x2x2", 8),
    ("v5p:4x4x8", 128),
    ("2 v5p:4x4x4", 64),  # slices
]


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize(("topology", "fsdp"), MESHES)
def test_weights_are_gathered_and_gradients_summed_natively(topology, fsdp, kind):
    """In stages a device receives as much as in one collective: half of an all-reduce."""
    *n_slices, topology = topology.split()
    devices = topology_devices(topology, int(*n_slices or [1]))[1]
    config = paper.get_config("moe_aux")
    config.mesh.fsdp = fsdp
    config = fill_mesh(Config.from_config_dict(config), len(devices))
    mesh = make_mesh(config, devices)
    function = {"all-gather": gather_in_stages, "reduce-scatter": sum_gradients}[kind]
    specs = [PartitionSpec(None, "fsdp"), PartitionSpec()]  # of the weight's shards, of all of it
    before, after = specs if kind == "all-gather" else specs[::-1]
    move = jax.shard_map(
        lambda w: function(w, "fsdp", 1),
        mesh=mesh,
        in_specs=before,
        out_specs=after,
        check_vma=False,
    )
    w = jax.ShapeDtypeStruct((8, 3072, 768), jnp.float32, sharding=NamedSharding(mesh, before))
    with jax.set_mesh(mesh), compiling_for(devices):
        _, text = hlo.compile_and_read(jax.jit(move).lower(w))
    found = [o for o in costs.Program(text).operations if o.collective]
    assert {o.collective for o in found} == {kind}
    assert math.prod(o.group_size for o in found) == fsdp
    received = sum(o.sent_bytes * (1 - 1 / o.group_size) for o in found)
    assert received == pytest.approx(4 * w.size * (1 - 1 / fsdp), rel=1e-3)

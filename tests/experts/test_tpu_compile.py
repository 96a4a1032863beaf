"""Grouped products compiled for TPUs that aren't here, forward and backward, with `libtpu` from its wheel.

`python -m benchmarks.tpu_compile` compiles every shape for every generation; here every shape is compiled for one.
"""

import os
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from aoe_jax.experts.grouped_matmul import grouped_matmul
from benchmarks.grouped_products import expert_shapes, lower_for, megablox_tile_flops

pytest.importorskip("libtpu")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def devices(generation):
    """Of the smallest topology. The tests of other processes may have loaded libtpu too."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices


def kernels_and_dense_products(lowered):
    # Of the program as lowered: jaxlib can't always print what a newer libtpu has compiled.
    text = lowered.as_text()
    return text.count("@tpu_custom_call"), text.count("stablehlo.dot_general")


@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("n_experts", [8, 64])
def test_useful_flops(generation, n_experts):
    """Three kernels and no other product; the compiler counts a kernel at the FLOPs it declares, so its tiles are added."""
    m, d, f = 131072, 768, 3840
    lowered = lower_for(devices(generation)[0], "megablox", m, d, f, n_experts, "bfloat16")
    assert kernels_and_dense_products(lowered) == (3, 0)
    assert lowered.compile().cost_analysis()["flops"] <= 1.10 * 6 * m * d * f
    assert megablox_tile_flops(m, d, f, n_experts, 2) <= 1.10


EVERY_SHAPE = list(zip(expert_shapes(), cycle(TOPOLOGIES), cycle(["float32", "bfloat16"]), cycle([32768, 131072, 96])))


@pytest.mark.parametrize(("shape", "generation", "dtype", "m"), EVERY_SHAPE)
def test_every_shape_compiles(shape, generation, dtype, m):
    lowered = lower_for(devices(generation)[0], "megablox", m, *shape, 8, dtype)
    assert kernels_and_dense_products(lowered) == (3, 0)
    lowered.compile()


def test_the_mesh_chooses_the_backend():
    """No argument is needed: on a CPU host, a program for a TPU mesh gets the TPU kernel, inside scan and remat too."""
    mesh = jax.sharding.Mesh(np.array(devices("v5e")), ("data",))
    spec = jax.sharding.PartitionSpec

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec("data"), spec(), spec()), out_specs=spec("data"), check_vma=False)
    def gradient(rows, weights, group_sizes):
        def loss(rows):
            layer = jax.checkpoint(lambda x, w: (jnp.tanh(grouped_matmul(x, w, group_sizes)), None))
            return jax.lax.scan(layer, rows, weights)[0].astype(jnp.float32).sum()

        return jax.grad(loss)(rows)

    shapes = [((4 * 256, 128), spec("data")), ((3, 8, 128, 128), spec())]
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, p)) for s, p in shapes]
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, spec()))
    lowered = jax.jit(gradient).lower(*args, sizes)
    assert kernels_and_dense_products(lowered)[0] >= 2
    lowered.compile()

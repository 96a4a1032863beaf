"""Attention by `splash`, compiled for absent TPUs."""

import math

import pytest

from aoe_jax.planning import costs
from benchmarks.compiling import compiled_attention, devices_of

pytestmark = pytest.mark.slow  # they compile for TPUs


@pytest.mark.parametrize(
    ("generation", "b", "length", "traffic"),  # in GB
    [("v5e", 8, 2048, 1.2), ("v5e", 2, 8192, 1.3), ("tpu7x", 8, 2048, 1.9)],
)
def test_splash_keeps_no_scores_and_pads_no_heads(generation, b, length, traffic):
    n_heads, width, n_blocks = 12, 64, length // (512 if length < 8192 else 1024)
    shape = b, n_heads, n_heads, length, width
    compiled, text = compiled_attention(devices_of(generation), "splash", shape)
    program = costs.Program(text)
    kernels = [o for o in program.operations if o.opcode == "tpu_custom_call"]
    met = (n_blocks + 1) / 2 / n_blocks  # the share of the pairs of blocks that are computed
    product = 2 * b * n_heads * length**2 * width * met
    assert sorted(o.flops for o in kernels) == [2 * product, 3 * product, 4 * product]
    assert all(o.occupied_flops == 2 * o.flops for o in kernels)  # of 128 lanes, 64 are used
    instructions = [i for part in program.computations.values() for i in part.values()]
    largest = max(math.prod(a.dims) for i in instructions for a in i.arrays)
    assert largest <= 2 * b * n_heads * length * width
    assert sum(o.times * o.hbm_bytes for o in program.operations) <= 1e9 * traffic
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3e9

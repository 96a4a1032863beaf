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
    shape = b, n_heads, _, length, width = b, 12, 12, length, 64
    compiled, text = compiled_attention(devices_of(generation), "splash", shape)
    program = costs.Program(text)
    instructions = [i for part in program.computations.values() for i in part.values()]
    assert [i.target for i in instructions].count("tpu_custom_call") == 3
    largest = max(math.prod(a.dims) for i in instructions for a in i.arrays)
    assert largest <= 2 * b * n_heads * length * width
    assert sum(o.times * o.hbm_bytes for o in program.operations) <= 1e9 * traffic
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3e9

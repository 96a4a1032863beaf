"""The figures of attention by backend, for a TPU that is not here."""

import json
import math

import pytest

from aoe_jax.planning import costs
from benchmarks.compiling import compiled_attention, devices_of
from tests.runs import run

pytestmark = pytest.mark.slow  # they compile for TPUs


def test_figures_of_both_backends(tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--shapes=1x2x1x256x64", f"--json={file}"]
    status, stdout, stderr = run(["-m", "benchmarks.attention", *arguments])
    assert status == 0, stderr
    splash, blocks = json.loads(file.read_text())
    assert (splash["backend"], blocks["backend"]) == ("splash", "blocks")
    least = 2 * 12 * 256 * 64  # q, k, v, the output, and the gradients of the four
    for figure in (splash, blocks):
        assert figure["hbm_traffic_bytes"] >= least and figure["likely_seconds"] > 0
    assert "v5e 1x2x1x256x64 splash: temporary 0.0" in stdout


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

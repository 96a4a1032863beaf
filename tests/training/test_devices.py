"""Compares reported memory with the sizes of arrays and parameters, psutil, and the system."""

import json
import subprocess
import sys

import jax
import numpy as np
import psutil
import pytest

from aoe_jax.model.counts import parameter_counts
from aoe_jax.training import devices
from aoe_jax.training.devices import process_memory
from aoe_jax.training.step_times import RepeatedStep
from tests.arrays import Device
from tests.hasty import HASTY
from tests.runs import ROOT, tiny_config


def test_memory_of_a_device(ragged):
    """The state is little more than the parameters and two moments, four bytes each, split over
    four devices. The arguments include the batch too.
    """
    fsdp = 4
    config = tiny_config(mesh__fsdp=fsdp, train__batch_size=8, data__document_mask=True)
    step = RepeatedStep(config)
    counted = 3 * 4 * parameter_counts(config).total / fsdp
    assert 1 <= step.memory["state_bytes"] / counted < 1.02
    arrays, first = jax.tree.leaves((step._state, step._batch)), jax.devices()[0]
    shards = [shard for array in arrays for shard in array.addressable_shards]
    live = sum(shard.data.nbytes for shard in shards if shard.device == first)
    assert step.memory["argument_bytes"] == pytest.approx(live, rel=0.02)
    temporary = step.program.memory_analysis().temp_size_in_bytes
    assert step.memory["temporary_bytes"] == temporary > 0


def test_process_memory(tmp_path, monkeypatch):
    """The two functions measure one after the other, so their results differ a little."""
    grown = np.ones(10**8 // 8)
    memory, process = process_memory(), psutil.Process().memory_info()
    assert memory["host_memory_bytes"] == pytest.approx(process.rss, rel=0.02)
    # JAX does not report the memory of CPU devices.
    assert memory.keys() == {"host_memory_bytes", "host_memory_peak_bytes"}
    peak = memory["host_memory_peak_bytes"]
    assert peak >= memory["host_memory_bytes"] > grown.nbytes
    del grown
    assert process_memory()["host_memory_peak_bytes"] == pytest.approx(peak, rel=0.02)
    monkeypatch.setattr(devices, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmRSS:\t     7 kB\n")  # gVisor has no VmHWM
    assert process_memory() == {"host_memory_bytes": 7 * 1024}
    # The two values may be of different devices.
    stats = [
        {"bytes_in_use": 5, "peak_bytes_in_use": 9},
        {"bytes_in_use": 7, "peak_bytes_in_use": 8},
    ]
    found = [Device(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: found)
    memory = process_memory()
    assert (memory["device_memory_bytes"], memory["device_memory_peak_bytes"]) == (7, 9)


STEP_TAKES = """
import json, jax, pathlib, time
from aoe_jax.training.devices import process_memory
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.timing import configuration
model = {"n_layers": 1, "d_model": 64, "n_heads": 1, "vocab_size": 512, "unroll": 1}
changes = {"model": model, "experts": {"d_ffn": 2048}, "train": {"batch_size": 64}}
step, taken, deadline = RepeatedStep(configuration("dense", changes)), [], time.monotonic() + 240
temporary, peak = step.memory["temporary_bytes"], float("inf")
for _ in range(5):
    while (before := process_memory()["host_memory_bytes"]) > peak - 0.99 * temporary:
        assert time.monotonic() < deadline  # the step before gives its memory back a moment later
        time.sleep(0.01)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    jax.block_until_ready(step())
    peak = process_memory()["host_memory_peak_bytes"]
    taken.append(peak - before)
print(json.dumps([temporary, max(taken[1:])]))
"""


@pytest.mark.slow
def test_temporary_memory_is_what_a_step_takes():
    """The temporary memory, about half a gigabyte, is the peak of the process in a step minus its
    memory before. The first step is left out, because it also allocates memory that stays.
    """
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": HASTY, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP_TAKES]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    temporary, taken = json.loads(done.stdout)
    assert temporary > 4e8 and taken == pytest.approx(temporary, rel=0.02)

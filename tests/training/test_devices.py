"""Compares reported memory with the sizes of arrays and parameters, and with psutil."""

import jax
import numpy as np
import psutil
import pytest

from aoe_jax.model.counts import parameter_counts
from aoe_jax.training import devices
from aoe_jax.training.devices import process_memory
from aoe_jax.training.step_times import RepeatedStep
from tests.arrays import Device
from tests.runs import tiny_config


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

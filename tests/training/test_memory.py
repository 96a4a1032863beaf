"""Memory compared with other counts: of arrays, parameters, psutil, and the system."""

import json
import subprocess
import sys

import jax
import numpy as np
import psutil
import pytest

from aoe_jax.model.counts import parameter_counts
from aoe_jax.model.declared import state_shardings
from aoe_jax.sharding import (
    batch_sharding,
    fill_mesh,
    make_mesh,
    put_batch,
    replicated,
)
from aoe_jax.training.devices import device_memory, host_memory, program_memory
from aoe_jax.training.step import init_state, make_train_step
from tests.hasty import HASTY
from tests.runs import ROOT, tiny_config


def program(config):
    """`(state, batch, compiled step)` on the mesh of a configuration, over all devices."""
    config = fill_mesh(config, jax.device_count())
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        shardings = state_shardings(mesh, jax.eval_shape(lambda: init_state(config, 0)))
        state = jax.jit(lambda: init_state(config, 0), out_shardings=shardings)()
        shape = (config.train.batch_size, config.data.seq_len)
        ones = np.ones(shape, np.int32)
        batch = {
            "inputs": ones,
            "targets": ones,
            "segment_ids": ones,
            "weights": ones.astype(np.float32),
        }
        batch = put_batch(batch_sharding(mesh), batch)
        step = jax.jit(
            make_train_step(config), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
        )
        return state, batch, step.lower(state, batch).compile()


@pytest.mark.parametrize("fsdp", [1, 4])
def test_what_a_device_holds(fsdp, ragged):
    """Parameters and two moments of four bytes each, split over `fsdp`, and little else; the
    arguments also have the batch.
    """
    config = tiny_config(mesh__fsdp=fsdp, train__batch_size=8, data__document_mask=True)
    state, batch, step = program(config)
    memory = program_memory(state, step)
    counted = 3 * 4 * parameter_counts(config).total / fsdp
    assert 1 <= memory["state_bytes"] / counted < 1.02
    first = jax.devices()[0]
    live = sum(
        s.data.nbytes
        for a in jax.tree.leaves((state, batch))
        for s in a.addressable_shards
        if s.device == first
    )
    assert memory["argument_bytes"] == pytest.approx(live, rel=0.02)
    assert memory["temporary_bytes"] == step.memory_analysis().temp_size_in_bytes > 0


def test_host_memory():
    """The two counts are taken one after the other, so they differ a little."""
    grown = np.ones(10**8 // 8)
    memory, process = host_memory(), psutil.Process().memory_info()
    assert memory["host_memory_bytes"] == pytest.approx(process.rss, rel=0.02)
    assert memory["host_memory_peak_bytes"] >= memory["host_memory_bytes"] > grown.nbytes
    del grown
    assert host_memory()["host_memory_peak_bytes"] == pytest.approx(
        memory["host_memory_peak_bytes"], rel=0.02
    )


def test_cpus_have_no_count():
    assert device_memory() == {}


STEP_TAKES = """
import json, jax, pathlib, time
from aoe_jax.training.devices import host_memory, program_memory
from aoe_jax.training.step_times import random_batch
from benchmarks.timing import configuration
from aoe_jax.training.step import init_state, make_train_step
model = {"n_layers": 1, "d_model": 64, "n_heads": 1, "vocab_size": 512, "unroll": 1}
changes = {"model": model, "experts": {"d_ffn": 2048}, "train": {"batch_size": 64}}
config = configuration("dense", changes)
state = jax.jit(lambda: init_state(config, 0))()
batch = jax.device_put(random_batch(config))
step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).compile()
temporary, taken = program_memory(state, step)["temporary_bytes"], []
for _ in range(5):
    jax.block_until_ready(state)
    time.sleep(0.3)  # memory of the step before is given back a moment later
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = host_memory()["host_memory_bytes"]
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    taken.append(host_memory()["host_memory_peak_bytes"] - before)
print(json.dumps([temporary, max(taken[1:])]))
"""


def test_temporary_memory_is_what_a_step_takes():
    """The peak of a process in a step over its memory before, for a model whose step needs half a
    gigabyte.

    The first step also takes memory that the process keeps; a later one may reuse the block of the
    step before.
    """
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": HASTY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STEP_TAKES], env=variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    temporary, taken = json.loads(done.stdout)
    assert temporary > 4e8 and taken == pytest.approx(temporary, rel=0.02)

"""Real processes on CPU: the curve of one, and checkpoints that go from four to two to one and to
other meshes.
"""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from tests.hasty import xla_flags
from tests.processes import (
    DENSE_FSDP,
    MESH,
    free_port,
    start_on,
    train_on,
    two_dense_processes,
    two_processes,
)
from tests.runs import (
    EVERY,
    SETTINGS,
    STEPS,
    finish,
    finished_run,
    read_metrics,
    run,
    saved,
    scratch,
    start,
    train_command,
)

# JAX notices after 100 s that a process has been killed, and within 1 s a SIGTERM, in which the run
# must not end.
NOTICES_SOON = """
import functools
import time
import jax
from aoe_jax import cli, train
from aoe_jax.training.stopping import StopRequests

initialize, asked = jax.distributed.initialize, StopRequests.asked
jax.distributed.initialize = functools.partial(initialize, heartbeat_timeout_seconds=20)
StopRequests.asked = lambda stop: (time.sleep(0.1), asked(stop))[1]
cli.run(train.main)
"""


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir)[0]]


@pytest.mark.slow
def test_two_processes_train_as_one_does():
    workdir, stderr = two_processes()
    np.testing.assert_allclose(losses(workdir), losses(finished_run()), rtol=1e-5)
    assert "2 processes, 4 devices" in stderr[0]
    assert not any("step" in text for text in stderr[1:])  # the first alone reports


@pytest.mark.slow
def test_evaluation_on_other_devices_than_training(tmp_path):
    """A run of four devices on one, and a run of one on eight, whose batches they do not divide;
    these without a cache.
    """
    workdir = shutil.copytree(two_processes()[0], tmp_path / "run")
    one, eight = tmp_path / "of_one", tmp_path / "of_eight"
    here = evaluated(workdir, JAX_COMPILATION_CACHE_DIR=str(one))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished_run(), elsewhere)
    there = evaluated(elsewhere, JAX_COMPILATION_CACHE_DIR=str(eight), XLA_FLAGS=xla_flags(8))
    assert any(one.glob("*")) and not any(eight.glob("*"))
    assert here["tokens"] == there["tokens"]
    # The same model, but for rounding.
    np.testing.assert_allclose(here["nll"], there["nll"], rtol=1e-4)


def evaluated(workdir, **variables):
    status, _, stderr = finish(start(["eval.py", f"--workdir={workdir}"], **variables))
    assert status == 0 and "Traceback" not in stderr, stderr
    return json.loads((workdir / "eval.json").read_text())


@pytest.mark.slow
def test_from_four_processes_to_two_to_one():
    """And from mesh (2, 1, 2, 1) to (1, 4, 1, 1) to a single device: the curve of one process."""
    moved, alone = (scratch("multiprocess") / name for name in ("moved", "alone"))
    rate = SETTINGS["train.learning_rate"]  # at every step, however many there are to be
    constant = {"train__warmup": 0, "train__final_learning_rate": rate, "train__eval_every": 0}
    stages = (4, 8, 10)
    status, _, stderr = run(train_command(alone, train__steps=stages[2], **constant))
    assert status == 0, stderr
    train_on(moved, 4, train__steps=stages[0], **MESH, **constant)
    (stderr, _) = train_on(moved, 2, mesh__fsdp=4, train__steps=stages[1], **constant)
    assert f"going on from step {stages[0]}" in stderr
    status, _, stderr = run(train_command(moved, train__steps=stages[2], **constant))
    assert status == 0, stderr
    assert f"going on from step {stages[1]}" in stderr
    np.testing.assert_allclose(losses(moved), losses(alone), rtol=1e-5)


def checkpoints(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]


def stop_one(workdir, number, after):
    """Sends a signal to process 1 of two once there is a checkpoint: `(statuses, stderr)`."""
    processes = start_on(workdir, 2, 2, program=("-c", NOTICES_SOON), **DENSE_FSDP)
    deadline = time.monotonic() + 120
    while not saved(workdir, after):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.005)
    processes[1].send_signal(number)
    outcomes = [finish(process) for process in processes]
    return [status for status, _, _ in outcomes], [stderr for _, _, stderr in outcomes]


@pytest.mark.slow
def test_one_process_of_two_is_stopped():
    """SIGTERM to one has both save and end; SIGKILL of one ends the other; what goes on then
    follows the same curve.
    """
    workdir = scratch("multiprocess") / "stopped"
    statuses, stderr = stop_one(workdir, signal.SIGTERM, after=EVERY)
    assert statuses == [0, 0], stderr
    stopped_at = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert all(
        f"preempted: saved at step {stopped_at} of {STEPS}; the same" in text for text in stderr
    )
    next_saved = stopped_at // EVERY * EVERY + EVERY
    statuses, stderr = stop_one(workdir, signal.SIGKILL, after=next_saved)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, 2), stderr
    # Either the lost connection is noticed here, or JAX's service ends the process.
    assert (
        "start all processes again: they go on from the newest checkpoint" in stderr[0]
        or "another task" in stderr[0]
    )
    train_on(workdir, 2, 2, **DENSE_FSDP)
    np.testing.assert_allclose(losses(workdir), losses(two_dense_processes()), rtol=1e-5)


@pytest.mark.slow
def test_ctrl_c_in_one_process_of_two_stops_both():
    workdir = scratch("multiprocess") / "interrupted"
    statuses, stderr = stop_one(workdir, signal.SIGINT, after=EVERY)
    assert statuses == [0, 130], stderr
    stopped_at = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    for text, word in zip(stderr, ("preempted", "interrupted"), strict=True):
        assert f"{word}: saved at step {stopped_at} of {STEPS}; the same" in text


@pytest.mark.slow
def test_a_cluster_of_one_process_is_stopped():
    workdir = scratch("multiprocess") / "cluster_of_one"
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=1", "--process=0"]
    process = start([*train_command(workdir, train__steps=5000, train__eval_every=0), *flags])
    deadline = time.monotonic() + 120
    while not saved(workdir, EVERY):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    status, _, stderr = finish(process)
    step = max(checkpoints(workdir))
    assert status == 0 and f"preempted: saved at step {step} of 5000" in stderr, stderr

"""Training on several CPU processes has the loss curve of one process. Checkpoints can be restored
on fewer processes and other meshes.
"""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from aoe_jax.training.checkpoint import Checkpoints
from tests import processes, runs
from tests.hasty import xla_flags
from tests.processes import DENSE_FSDP, train_on
from tests.runs import EVERY, STEPS, finish, finished_run, losses, wait_for

pytestmark = pytest.mark.slow

# By default, JAX needs 100 s to detect a killed process, so the time is reduced. It needs up to 1 s
# to detect a SIGTERM, so steps are slowed down to keep the run from ending before.
NOTICES_SOON = """
import functools
import time
import jax
from aoe_jax import cli, train
from aoe_jax.training.stopping import StopRequests

initialize, asked = jax.distributed.initialize, StopRequests.asked
jax.distributed.initialize = functools.partial(initialize, heartbeat_timeout_seconds=20)
StopRequests.asked = lambda stop: (time.sleep(0.25), asked(stop))[1]
cli.run(train.main)
"""


def test_two_processes_train_as_one_does():
    workdir, stderr = processes.two_processes()
    np.testing.assert_allclose(losses(workdir), losses(finished_run()), rtol=1e-5)
    assert "2 processes, 4 devices" in stderr[0]
    assert not any("step" in text for text in stderr[1:])  # only the first process reports
    (sample,) = map(json.loads, (workdir / "samples.jsonl").read_text().splitlines())
    assert sample["step"] == STEPS and json.dumps(sample["text"], ensure_ascii=False) in stderr[0]


def test_evaluation_on_other_devices_than_training(tmp_path):
    """A run on four devices is evaluated on one, and a run on one device on eight, which do not
    divide its batches. Only one device uses the compilation cache.
    """
    reports = []
    for trained, n_devices in ((processes.two_processes()[0], 1), (finished_run(), 8)):
        workdir = shutil.copytree(trained, tmp_path / f"run_{n_devices}")
        cache = tmp_path / f"cache_{n_devices}"
        variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": xla_flags(n_devices)}
        status, _, stderr = finish(runs.start(["eval.py", f"--workdir={workdir}"], **variables))
        assert status == 0 and "Traceback" not in stderr, stderr
        assert any(cache.glob("*")) == (n_devices == 1)
        reports.append(json.loads((workdir / "eval.json").read_text()))
    assert reports[0]["tokens"] == reports[1]["tokens"]
    # Both models are equal except for rounding.
    np.testing.assert_allclose(reports[0]["nll"], reports[1]["nll"], rtol=1e-4)


@pytest.mark.parametrize(("n_processes", "n_devices"), [(1, 1), (2, 4)])
def test_a_run_goes_on_with_other_processes_and_meshes(tmp_path, n_processes, n_devices):
    """From two processes and the mesh (2, 1, 2, 1) to one device, or to the mesh (1, 4, 1, 1)."""
    workdir = shutil.copytree(processes.two_processes()[0], tmp_path / "run")
    for name in ("summary.json", "heartbeat.json"):  # as if it had ended before its last checkpoint
        (workdir / name).unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    stderr, *_ = train_on(workdir, n_processes, n_devices, mesh__fsdp=n_devices)
    assert f"going on from step {STEPS - EVERY}" in stderr
    np.testing.assert_allclose(losses(workdir), losses(finished_run()), rtol=1e-5)


def stop_one(workdir, number, after):
    """Signals process 1 of two when a checkpoint is saved; returns `(statuses, stderr)`."""
    pair = processes.start_on(workdir, 2, 2, program=("-c", NOTICES_SOON), **DENSE_FSDP)
    wait_for(pair[1], lambda: runs.saved(workdir, after))
    pair[1].send_signal(number)
    statuses, _, stderr = zip(*map(finish, pair), strict=True)
    return statuses, stderr


def test_one_process_of_two_is_stopped(tmp_path):
    """After SIGTERM or Ctrl-C to one process, both save and end. After SIGKILL of one, the other
    process ends too. The run continues with the same loss curve.
    """
    stops = ((signal.SIGTERM, (0, 0), "preempted"), (signal.SIGINT, (0, 130), "interrupted"))
    after = EVERY
    for number, expected, word in stops:
        statuses, stderr = stop_one(tmp_path, number, after)
        assert statuses == expected, stderr
        step = Checkpoints(tmp_path).steps()[-1]
        for text, said in zip(stderr, ("preempted", word), strict=True):
            assert f"{said}: saved at step {step} of {STEPS}; the same" in text
        after = step // EVERY * EVERY + EVERY
    statuses, stderr = stop_one(tmp_path, signal.SIGKILL, after)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, 2), stderr
    # Either this process detects the lost connection, or JAX's service ends it.
    assert re.search("start all processes again: they go on from the new|another task", stderr[0])
    train_on(tmp_path, 2, 2, **DENSE_FSDP)
    np.testing.assert_allclose(losses(tmp_path), losses(processes.two_dense_processes()), rtol=1e-5)

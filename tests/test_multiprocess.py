"""Real processes on CPU: the curve of one, and checkpoints that go from four to two to one."""

import shutil
import socket

import numpy as np
import pytest

from tests.runs import STEPS, finish, finished_run, read_metrics, run, scratch, start, train_command

# Two devices a process where there are two processes, one where there are four: four devices always.
MESH = {"mesh__data": 2, "mesh__expert": 2}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def train_on(workdir, n_processes, n_devices=4, **changes):
    """Trains on several processes; returns their stderr."""
    port = free_port()
    devices = f"--xla_force_host_platform_device_count={n_devices // n_processes}"
    flags = [f"--coordinator=localhost:{port}", f"--processes={n_processes}"]
    processes = [
        start(
            [*train_command(workdir, **changes), *flags, f"--process={i}"],
            XLA_FLAGS=f"--xla_backend_optimization_level=0 {devices}",
        )
        for i in range(n_processes)
    ]
    outcomes = [finish(process) for process in processes]
    assert [status for status, _, _ in outcomes] == [0] * n_processes, outcomes[0][2] + outcomes[-1][2]
    return [stderr for _, _, stderr in outcomes]


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir)[0]]


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_train_as_one_does(n_processes):
    workdir = scratch("multiprocess") / str(n_processes)
    stderr = train_on(workdir, n_processes, **MESH)
    np.testing.assert_allclose(losses(workdir), losses(finished_run()), rtol=1e-5)
    assert f"{n_processes} processes, 4 devices" in stderr[0]
    assert not any("step" in text for text in stderr[1:])  # the first alone reports


def test_from_four_processes_to_two_to_one():
    workdir = scratch("multiprocess") / "moved"
    half, most = STEPS // 2, STEPS - 4
    train_on(workdir, 4, **MESH, train__steps=half)
    train_on(workdir, 2, mesh__fsdp=4, train__steps=most)
    status, _, stderr = run(train_command(workdir, train__steps=STEPS))
    assert status == 0, stderr
    assert f"going on from step {most}" in stderr
    steps = [line["step"] for line in read_metrics(workdir)[0]]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    shutil.rmtree(workdir)

"""Starts training runs of several processes."""

import contextlib
import random
import socket

from tests.hasty import xla_flags
from tests.runs import DENSE, STEPS, finish, scratch, shared, start, train_command

# For two processes with two devices each.
MESH = {"mesh__data": 2, "mesh__expert": 2}
# For tests that do not depend on the model: each process has one device and saves half the state.
DENSE_FSDP = DENSE | {"train__eval_every": 0, "mesh__fsdp": 2}


def free_port():
    """Returns a free port that the system does not give to programs that ask for any port."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise OSError("no port is free")


def start_on(workdir, n_processes, n_devices=4, program=("train.py",), **changes):
    """Starts training on several processes."""
    port = free_port()
    command = [*program, *train_command(workdir, **changes)[1:]]
    flags = (
        [f"--coordinator=localhost:{port}", f"--processes={n_processes}"] if n_processes > 1 else []
    )
    return [
        start(
            [*command, *flags, *([f"--process={i}"] if flags else [])],
            XLA_FLAGS=xla_flags(n_devices // n_processes),
        )
        for i in range(n_processes)
    ]


def train_on(workdir, n_processes, n_devices=4, **changes):
    """Trains on several processes; returns their stderr."""
    outcomes = [finish(process) for process in start_on(workdir, n_processes, n_devices, **changes)]
    assert [status for status, _, _ in outcomes] == [0] * n_processes, (
        outcomes[0][2] + outcomes[-1][2]
    )
    return [stderr for _, _, stderr in outcomes]


@shared
def two_processes():
    """Workdir and stderr of a run of two processes."""
    workdir = scratch("multiprocess") / "two"
    return workdir, train_on(workdir, 2, train__sample_every=STEPS, **MESH)


@shared
def two_dense_processes():
    """Workdir of a run of two processes with `DENSE_FSDP`."""
    workdir = scratch("multiprocess") / "two_dense"
    train_on(workdir, 2, 2, **DENSE_FSDP)
    return workdir

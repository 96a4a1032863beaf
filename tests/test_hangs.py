"""Hangs in real runs: every process ends, says where it hangs, and the run goes on later."""

import re
import shutil

import pytest

from aoe_jax.conversion.exporting import export
from aoe_jax.errors import Hang
from tests.processes import DENSE_FSDP, start_on
from tests.runs import (
    STEPS,
    corpus_store,
    dense_command,
    dense_run,
    finish,
    last_line,
    patched,
    run,
    same_end,
    start,
    succeed,
)
from tests.test_fault_matrix import STATE, Fault

pytestmark = pytest.mark.slow

# The data of a batch never arrives, in process `who`: a read that no signal ends.
NO_DATA = """
import os
import jax
from aoe_jax.training import loop
batches, reading = loop.train_batches, os.pipe()[0]
class Hanging:
    def __init__(self, data): self.data = iter(data)
    def __getattr__(self, name): return getattr(self.data, name)
    def __next__(self):
        if self.data.get_state()["next_index"] == {batch} and jax.process_index() == {who}:
            read_that_hangs()
        return next(self.data)
def read_that_hangs():
    os.read(reading, 1)
loop.train_batches = lambda *arguments: Hanging(batches(*arguments))
"""


def says_where(stderr, workdir, when):
    """Whether the last line has the status and the step of process 0, and where its stacks are."""
    words = rf"error: process 0 \({when}\) made no progress for \d+ s \(train\.hang_timeout=5\); "
    return re.fullmatch(f"{words}its stacks are in {workdir}/hang", last_line(stderr))


def goes_on(workdir, step):
    """Whether the run continues from a step and ends as if nothing had been."""
    stderr = succeed(dense_command(workdir))
    return f"going on from step {step}" in stderr and same_end(workdir, dense_run())


@pytest.mark.parametrize(
    ("batch", "when"), [(0, "restoring, after step 0"), (7, "training, after step 7")]
)
def test_data_that_hang(tmp_path, batch, when):
    workdir = tmp_path / "run"
    program = NO_DATA.format(who=0, batch=batch)
    status, _, stderr = run(patched(program, workdir, train__hang_timeout=5))
    assert status == Hang.status and says_where(stderr, workdir, when), stderr
    assert "read_that_hangs" in (workdir / "hang" / "process_0.txt").read_text()
    if batch:
        assert goes_on(workdir, 6)


@pytest.mark.parametrize(
    ("operation", "file", "when"),
    [
        ("c", "run/owner.lease", "restoring"),
        ("o", "run/config.json", "restoring"),
        ("r", "/validation-0", "validating, after step 10"),
        ("r", STATE + "state", "restoring"),
        ("o", "/manifest.json", "restoring"),
        ("o", "model/config.json", "restoring"),
    ],
)
def test_a_disk_that_hangs(tmp_path, operation, file, when):
    """When the lease is taken, while the files of a run, prepared data or a first model are read,
    and in the first validation.
    """
    workdir, settings = tmp_path / "run", {"train__hang_timeout": 5}
    if "run/" in file or "state" in file:
        shutil.copytree(dense_run(), workdir)
        (workdir / "summary.json").unlink()
    if "manifest" in file:
        settings |= {"data__name": "prepared", "data__path": str(corpus_store())}
    if "model" in file:
        export(dense_run(), tmp_path / "model")
        settings["train__init_from"] = tmp_path / "model"
    fault = Fault(tmp_path, "HANG", operation, file)
    status, _, stderr = finish(start(dense_command(workdir, **settings), **fault.variables))
    assert status == Hang.status and says_where(stderr, workdir, when), stderr
    stacks = (workdir / "hang" / "process_0.txt").read_text()
    assert "model" not in file or "state_from_model" in stacks
    if "state" in file:
        assert "read_checkpoint" in stacks
        fault.end()
        assert goes_on(workdir, STEPS)


def test_processes_of_which_one_hangs(tmp_path):
    """One of two processes has no data, the other waits for it in a collective."""
    workdir = tmp_path / "run"
    program = patched(NO_DATA.format(who=1, batch=7), workdir)[:2]
    processes = start_on(workdir, 2, 2, program=program, train__hang_timeout=10, **DENSE_FSDP)
    outcomes = [finish(process) for process in processes]
    # JAX may end the second process before its report.
    assert [status for status, _, _ in outcomes].count(Hang.status) >= 1, outcomes
    assert "read_that_hangs" in (workdir / "hang" / "process_1.txt").read_text()

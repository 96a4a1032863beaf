"""Hangs in real runs: every process ends, says where it hangs, and the run goes on later."""

import re
import shutil
import signal

import pytest

from aoe_jax.errors import Hang
from tests.processes import DENSE_FSDP, start_on
from tests.runs import (
    EVERY,
    STEPS,
    corpus_store,
    dense_command,
    dense_run,
    finish,
    run,
    same_end,
    start,
)
from tests.test_fault_matrix import STATE, Fault
from tests.test_promises import SLOW_SAVES, heartbeat, last_line, patched, wait_for

# The data of a batch never arrives, in process `who`: a read that no signal ends.
NO_DATA = """
import os
import jax
import train
from aoe_jax import cli
from aoe_jax.training import beginning, watchdog
watchdog.TERM_SECONDS = 1.0
batches, reading = beginning.train_batches, os.pipe()[0]
class Hanging:
    def __init__(self, data): self.data = iter(data)
    def __iter__(self): return self
    def __getattr__(self, name): return getattr(self.data, name)
    def __next__(self):
        if self.data.get_state()["next_index"] == {batch} and jax.process_index() == {who}:
            read_that_hangs()
        return next(self.data)
def read_that_hangs():
    open({marker!r}, "w").close()
    os.read(reading, 1)
beginning.train_batches = lambda *arguments: Hanging(batches(*arguments))
cli.run(train.main)
"""


def without_data(tmp_path, who, batch=7):
    """A program that trains until the data of a batch never arrives, in process `who`."""
    return NO_DATA.format(who=who, batch=batch, marker=str(tmp_path / "hangs"))


def goes_on(workdir, step):
    """Whether the run continues from a step and ends as if nothing had been."""
    status, _, stderr = run(dense_command(workdir))
    assert status == 0 and f"going on from step {step}" in stderr, stderr
    return same_end(workdir, dense_run())


def says_where(stderr, workdir, when):
    """Whether the last line has the status and the step of process 0, and where its stacks are."""
    words = rf"error: process 0 \({when}\) made no progress for \d+ s \(train\.hang_timeout=5\): "
    return re.fullmatch(f"{words}its stacks are in {workdir}/hang", last_line(stderr))


@pytest.mark.parametrize(
    ("batch", "when"),
    [(0, "restoring, after step 0"), (1, "training, after step 0"), (7, "training, after step 6")],
)
def test_a_hang_ends(tmp_path, batch, when):
    workdir = tmp_path / "run"
    program = without_data(tmp_path, 0, batch)
    status, _, stderr = run(patched(program, workdir, train__hang_timeout=5))
    assert status == Hang.status and says_where(stderr, workdir, when), stderr
    assert "read_that_hangs" in (workdir / "hang" / "process_0.txt").read_text()
    if batch == 7:
        assert goes_on(workdir, 6)


@pytest.mark.parametrize(
    ("operation", "file", "when"),
    [
        ("c", "run/owner_1.json", "restoring"),
        ("o", "run/config.json", "restoring"),
        ("r", "/validation-0", "validating, after step 10"),
    ],
)
def test_a_disk_that_hangs(tmp_path, operation, file, when):
    """When the owner's file is made, while the files of a run are read, and in its first
    validation.
    """
    whole, workdir = dense_run(), tmp_path / "run"
    if file.startswith("run/"):
        shutil.copytree(whole, workdir)
        (workdir / "summary.json").unlink()
    fault = Fault(tmp_path, "HANG", operation, file)
    command = dense_command(workdir, train__hang_timeout=5)
    status, _, stderr = finish(start(command, **fault.variables))
    assert status == Hang.status and says_where(stderr, workdir, when), stderr


def test_prepared_data_that_hang(tmp_path):
    fault, store = Fault(tmp_path, "HANG", "o", "/manifest.json"), corpus_store()
    settings = {"data__name": "prepared", "data__path": str(store), "train__hang_timeout": 5}
    process = start(dense_command(tmp_path / "run", **settings), **fault.variables)
    status, _, stderr = finish(process)
    assert status == Hang.status and says_where(stderr, tmp_path / "run", "restoring"), stderr


def test_a_restore_that_hangs(tmp_path):
    """The disk does not answer a read of the newest checkpoint."""
    workdir = shutil.copytree(dense_run(), tmp_path / "run")
    (workdir / "summary.json").unlink()
    fault = Fault(tmp_path, "HANG", "r", STATE + "state")
    process = start(dense_command(workdir, train__hang_timeout=5), **fault.variables)
    status, _, stderr = finish(process)
    when = f"restoring, after step {STEPS}"
    assert status == Hang.status and says_where(stderr, workdir, when), stderr
    assert "read_checkpoint" in (workdir / "hang" / "process_0.txt").read_text()
    assert not [*workdir.glob("owner_*.json")]
    fault.end()
    assert goes_on(workdir, STEPS)


@pytest.mark.parametrize(
    ("file", "reader", "when"),
    [
        ("config.json", "check_start", "restoring"),
        ("tokenizer.json", "state_from_model", "restoring, after step 0"),
    ],
)
def test_a_first_model_that_hangs(tmp_path, file, reader, when):
    """The disk does not answer when `train.init_from` is opened."""
    workdir, model = tmp_path / "run", tmp_path / "model"
    status, _, stderr = run(
        ["-m", "aoe_jax.export", f"--workdir={dense_run()}", f"--output={model}"]
    )
    assert status == 0, stderr
    fault = Fault(tmp_path, "HANG", "o", f"model/{file}")
    command = dense_command(workdir, train__init_from=model, train__hang_timeout=5)
    status, _, stderr = finish(start(command, **fault.variables))
    assert status == Hang.status and says_where(stderr, workdir, when), stderr
    assert reader in (workdir / "hang" / "process_0.txt").read_text()


def test_sigterm_in_a_hang(tmp_path):
    """The loop waits for data between two checkpoints; its last state is saved."""
    workdir = tmp_path / "run"
    process = start(patched(without_data(tmp_path, 0), workdir, checkpoint__every=5))
    wait_for(process, (tmp_path / "hangs").exists)
    process.send_signal(signal.SIGTERM)
    status, _, stderr = finish(process)
    assert status == 0, stderr
    assert re.fullmatch(
        r"preempted: process 0 \(training, after step 7\) made no progress for \d+ s after "
        "SIGTERM; saved; the same command goes on from the newest checkpoint",
        last_line(stderr),
    )
    assert goes_on(workdir, 7)


def test_processes_that_are_late(tmp_path):
    """One of two processes has no data, the other waits for it in a collective."""
    workdir = tmp_path / "run"
    program = "-c", without_data(tmp_path, 1)
    processes = start_on(workdir, 2, 2, program=program, train__hang_timeout=10, **DENSE_FSDP)
    outcomes = [finish(process) for process in processes]
    assert [status for status, _, _ in outcomes].count(Hang.status) >= 1, outcomes
    for process, (status, _, stderr) in enumerate(outcomes):
        if status == Hang.status:  # JAX may end the second before its report
            assert f"error: process {process} (training, after step" in last_line(stderr)
            assert "process 1 is behind" in last_line(stderr)
    assert "read_that_hangs" in (workdir / "hang" / "process_1.txt").read_text()


def test_a_save_that_is_slower_than_a_hang(tmp_path):
    """A SIGTERM that was taken in has all the time that its save needs."""
    workdir = tmp_path / "run"
    code = "from aoe_jax.training import watchdog\nwatchdog.TERM_SECONDS = 1.0\n"
    code += SLOW_SAVES.replace("sleep(1)", "sleep(2)") + "import train\n"
    code += "from aoe_jax import cli\ncli.run(train.main)"
    process = start(patched(code, workdir))
    wait_for(process, lambda: (heartbeat(workdir)["step"] or 0) >= EVERY)
    process.send_signal(signal.SIGTERM)
    status, _, stderr = finish(process)
    said = re.match(r"preempted: saved at step (\d+)", last_line(stderr))
    assert status == 0 and said, stderr
    assert goes_on(workdir, said[1])

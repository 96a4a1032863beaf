"""The ten promises of docs/training.md, in real processes; the slow tests have more faults.

Other files test a kill (1, `test_train.py`), the supervisor (8, `test_supervise.py`), mistakes (9,
`test_bad_input.py`), and files of strangers (10, `test_fuzz.py` and `data/test_prepare.py`).
"""

import itertools
import json
import re
import shutil
import signal
import socket

import pytest

from aoe_jax.errors import Interrupted
from tests import runs
from tests.runs import (
    EVERY,
    LOG_EVERY,
    SLOW_SAVES,
    STEPS,
    dense_command,
    dense_run,
    last_line,
    patched,
    run,
    start,
)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def ends_as_ever(workdir):
    """Continues a run, which must end like an uninterrupted run; returns its stderr."""
    stderr = runs.succeed(dense_command(workdir))
    assert runs.same_end(workdir, dense_run())
    return stderr


def test_asked_to_stop_while_training(workdir):
    process = start(dense_command(workdir))
    runs.wait_for(process, lambda: runs.saved(workdir, EVERY))
    process.send_signal(signal.SIGTERM)
    status, _, stderr = runs.finish(process)
    assert status == 0, stderr
    words = rf"preempted: saved at step (\d+) of {STEPS}; the same command goes on from there"
    step = int(re.fullmatch(words, last_line(stderr))[1])
    assert (workdir / "checkpoints" / str(step)).exists()
    assert runs.heartbeat(workdir)["status"] == "preempted"
    assert runs.heartbeat(workdir)["step"] == step
    stderr = ends_as_ever(workdir)
    assert f"going on from step {step}" in stderr and last_line(stderr)[9:].startswith("done: ")
    assert runs.heartbeat(workdir)["status"] == "finished"


# The signal is sent in the middle of a validation.
STOPPED_VALIDATION = """
import os, signal
from aoe_jax.training import validation
batches = validation.eval_batches
def interrupted(*arguments):
    for n, batch in enumerate(batches(*arguments)):
        yield batch
        if n == 1 and {condition}:
            os.kill(os.getpid(), signal.SIGTERM)
validation.eval_batches = interrupted
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_asked_to_stop_while_validating(workdir, last):
    """The interrupted validation is repeated, also if it is the last one of the run."""
    lines = f"open({str(workdir / 'metrics.jsonl')!r})"
    condition = f"sum('validation_nll' in line for line in {lines}) == {2 if last else 0}"
    status, _, stderr = run(patched(STOPPED_VALIDATION.format(condition=condition), workdir))
    stopped = f"preempted: saved at step {STEPS if last else 10} of"
    assert status == 0 and last_line(stderr).startswith(stopped), stderr
    assert (workdir / "checkpoints" / str(STEPS if last else 10)).exists()
    assert not (workdir / "summary.json").exists()
    ends_as_ever(workdir)


def test_ctrl_c_ends_a_stop_at_once(workdir):
    """The save after SIGTERM never ends. SIGTERM again changes nothing; Ctrl-C ends the run."""
    process = start(patched(SLOW_SAVES.format(seconds=3600), workdir))
    requests = ("training", signal.SIGTERM), ("saving", signal.SIGTERM), ("saving", signal.SIGINT)
    for status, number in requests:
        runs.wait_for(process, lambda status=status: runs.heartbeat(workdir)["status"] == status)
        process.send_signal(number)
    assert runs.finish(process)[0] == Interrupted.status


def test_two_runs_begin_in_one_workdir(workdir):
    """The workdir does not exist when both start. One run trains, the other changes nothing."""
    endless, rates = {"train__steps": 10**6, "train__eval_every": 0}, (0.003, 0.01)
    commands = [dense_command(workdir, train__learning_rate=rate, **endless) for rate in rates]
    processes = [start(command) for command in commands]
    runs.wait_for(None, lambda: any(process.poll() is not None for process in processes))
    winner = 0 if processes[0].poll() is None else 1
    runs.wait_for(processes[winner], lambda: (runs.heartbeat(workdir)["step"] or 0) > LOG_EVERY)
    processes[winner].send_signal(signal.SIGTERM)
    outcomes = [runs.finish(process) for process in processes]
    status, _, stderr = outcomes[1 - winner]
    owner = f"{workdir} is in use by process {processes[winner].pid} on {socket.gethostname()}"
    assert status == 5 and owner in last_line(stderr), stderr
    assert outcomes[winner][0] == 0, outcomes
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["learning_rate"] == rates[winner]
    steps = [line["step"] for line in runs.read_metrics(workdir)[0]]
    assert steps == [*range(LOG_EVERY, steps[-1] + 1, LOG_EVERY)]


SHORT_LEASE = """
from aoe_jax.storage import lease
lease.RENEW, lease.STALE = 0.5, 6.0
"""


@pytest.mark.slow
def test_an_owner_that_is_suspended(workdir):
    """Another process takes over the run, and the suspended process ends when it is resumed, before
    it saves.
    """
    settings = {"train__steps": 10**6, "train__eval_every": 0, "train__log_every": 10**6}
    first = start([*patched(SHORT_LEASE, workdir, **settings), "--retry_seconds=1"])
    runs.wait_for(first, lambda: runs.heartbeat(workdir)["status"] == "training")
    first.send_signal(signal.SIGSTOP)
    (workdir / "config.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "heartbeat.json").write_text("{}")
    stderr = runs.succeed(patched(SHORT_LEASE, workdir))
    assert "was taken over from process" in stderr and runs.same_end(workdir, dense_run())
    whole = {name: text for name, text in runs.contents(workdir).items() if "events" not in name}
    first.send_signal(signal.SIGCONT)
    status, _, stderr = runs.finish(first)
    assert status == 5 and "owner.lease is gone" in last_line(stderr), stderr
    assert whole.items() <= runs.contents(workdir).items()


def test_damaged_newest_checkpoint(workdir):
    shutil.copytree(dense_run(), workdir)
    (workdir / "summary.json").unlink()
    runs.truncate_state(workdir)
    stderr = ends_as_ever(workdir)
    assert f"checkpoint of step {STEPS} is damaged" in stderr and "Traceback" not in stderr
    assert f"going on from step {STEPS - EVERY}" in stderr


def test_history_is_not_erased(workdir, tmp_path):
    """A run without its checkpoints is refused, until a flag of the user says how to start."""
    shutil.copytree(dense_run(), workdir)
    shutil.move(workdir / "checkpoints", tmp_path / "checkpoints")
    before, last = runs.contents(workdir), STEPS - EVERY
    longer = dense_command(workdir, train__steps=STEPS + 2)

    def refused(command, words):
        status, _, stderr = run(command)
        assert status == 2 and words in last_line(stderr), stderr

    there = f"shows that a checkpoint of step {STEPS} was complete, but checkpoints/ has none."
    refused(longer, f"{there} Bring the missing ones back; or --start-over begins anew")
    assert runs.contents(workdir) == before
    shutil.move(tmp_path / "checkpoints", workdir / "checkpoints")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    refused(longer, f"or --go-back={last} continues from that")
    refused([*longer, "--go-back=5"], f"--go-back=5: {workdir} has checkpoints of steps")

    stderr = runs.succeed([*longer, f"--go-back={last}"])
    assert f"going on from step {last}" in stderr
    (aside,) = (workdir / "set_aside").iterdir()
    assert (aside / "metrics.jsonl.whole").read_bytes() == before["metrics.jsonl"]
    n_lines = last // LOG_EVERY
    assert runs.untimed(workdir)[0][:n_lines] == runs.untimed(dense_run())[0][:n_lines]

    stderr = runs.succeed([*dense_command(workdir), "--start-over"])
    assert "going on" not in stderr and runs.same_end(workdir, dense_run())
    assert len([*(workdir / "set_aside").iterdir()]) == 2


def test_a_run_that_ends_where_it_goes_back_to(workdir):
    """The step that it goes back to is validated, because it was not validated before."""
    last = STEPS - EVERY
    shutil.copytree(dense_run(), workdir)
    runs.succeed([*dense_command(workdir, train__steps=last), f"--go-back={last}"])
    assert [line["step"] for line in runs.read_metrics(workdir)[1]] == [10, 20, last]


# The first files cannot be written, and a save in the background has failed when step 4 is done.
PASSING_FAULT = """
import errno, os
from aoe_jax.training import writers
from aoe_jax.training.checkpoint import Checkpoints
looks = iter([False, False, False, True])
Checkpoints.has_failed = lambda self: next(looks, False)
sync, left = os.fsync, 3
def faulty(file):
    global left
    left -= 1
    if left >= 0:
        raise OSError(errno.EIO, "Input/output error")
    sync(file)
writers.os.fsync = faulty
"""


def test_a_passing_fault_of_the_disk(workdir):
    whole = dense_run()  # makes the token store too
    stderr = runs.succeed(patched(PASSING_FAULT, workdir, checkpoint__keep=99))
    assert "cannot be written (Input/output error)" in stderr
    assert (workdir / "checkpoints" / "4").exists()  # at once, not with the next save
    assert runs.same_end(workdir, whole)


HANG = """
import os
from aoe_jax.training import loop
def read_that_hangs(*arguments):
    os.read(os.pipe()[0], 1)
loop.evaluate = read_that_hangs
"""


# Prints the statuses of the heartbeat with the newest checkpoint.
BEATS = """
import sys
from aoe_jax.training.heartbeat import Heartbeat
beat = Heartbeat.beat
def told(self, status, step=None):
    beat(self, status, step)
    print("beat", status, self.saved, file=sys.stderr)
Heartbeat.beat = told
"""


@pytest.mark.slow
def test_a_hang(workdir):
    """The run hangs in its first validation, after the checkpoint of step 9."""
    status, _, stderr = run(patched(HANG, workdir, train__hang_timeout=3))
    assert status == 6 and "(validating, after step 10) made no progress" in last_line(stderr)
    assert "read_that_hangs" in (workdir / "hang" / "process_0.txt").read_text()
    began = runs.heartbeat(workdir)["began"]
    stderr = runs.succeed(patched(BEATS, workdir))
    assert "going on from step 9" in stderr and runs.same_end(workdir, dense_run())
    assert runs.heartbeat(workdir)["began"] == began
    beats = [line[5:] for line in stderr.splitlines() if line.startswith("beat ")]
    beats = [beat for beat, _ in itertools.groupby(beats)]
    # Preparing data and compiling, also the first evaluation step, have no time limit.
    assert beats[:3] == ["preparing None", "restoring None", "compiling None"]
    words = ("compiling", "training", "validating", "compiling", "validating")
    assert beats[3:8] == [f"{word} 9" for word in words] and "compiling" not in str(beats[8:])


POISONED = """
import numpy as np
from aoe_jax.training import loop
batches = loop.train_batches
class Poisoned:
    def __init__(self, data): self.data = iter(data)
    def __getattr__(self, name): return getattr(self.data, name)
    def __next__(self):
        batch = next(self.data)
        if self.data.get_state()["next_index"] in {bad}:
            batch["weights"][0, 0] = np.nan
        return batch
loop.train_batches = lambda *arguments: Poisoned(batches(*arguments))
"""


def test_batch_that_is_not_finite(workdir, tmp_path):
    """It updates nothing, and is counted and logged. A kill between such batches has no effect."""
    whole, code = tmp_path / "whole", POISONED.format(bad="(5, 6, 13)")
    stderr = runs.succeed(patched(code, whole, checkpoint__keep=99))
    assert "step 5 skipped: loss nan, gradient norm nan; its batch has the sequences 16" in stderr
    assert stderr.count("skipped:") == 3
    lines, _ = runs.read_metrics(whole)
    assert [line["skipped"] for line in lines] == [0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert lines[2]["loss"] is None and lines[3]["loss"] < lines[0]["loss"]
    assert not (whole / "checkpoints" / "6").exists()

    process = start(patched(code, workdir))
    runs.kill_when(process, lambda: (runs.heartbeat(workdir)["step"] or 0) >= 8)
    runs.succeed(patched(code, workdir))
    assert runs.same_end(workdir, whole)


@pytest.mark.slow
def test_run_that_cannot_get_on(workdir):
    changes = {"train__max_skipped": 3, "checkpoint__every": 4}
    code = SLOW_SAVES.format(seconds=1) + POISONED.format(bad="range(10, 99)")
    for again in (False, True):
        status, _, stderr = run(patched(code, workdir, **changes))
        words = "error: stopped at step 12: the last 3 updates were skipped"
        assert status == 4 and last_line(stderr).startswith(words), stderr
        assert ("going on from step 8" in stderr) == again and "Traceback" not in stderr
        assert runs.heartbeat(workdir)["status"] == "diverged"
        assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}
    runs.succeed(dense_command(workdir, **changes))  # it continues with valid data


# The loop reads the clock at every log line and after every save; each time it is an hour later.
HOURLY = """
from types import SimpleNamespace
from aoe_jax.training import loop
now, clock = loop.time.monotonic(), loop.time
def hour_later():
    global now
    now += 3600
    return now
loop.time = SimpleNamespace(**vars(clock) | {"monotonic": hour_later})
"""


@pytest.mark.slow
def test_saves_by_the_clock(workdir):
    """The interval begins anew after each save. The saves do not change the results of a run."""
    changes = {"checkpoint__every": 100, "checkpoint__every_minutes": 90, "checkpoint__keep": 99}
    runs.succeed(patched(HOURLY, workdir, **changes))
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == [*range(2 * LOG_EVERY, STEPS + 1, 2 * LOG_EVERY)]
    assert runs.same_end(workdir, dense_run())

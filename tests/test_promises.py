"""The ten promises of docs/training.md, in real processes; more faults are in the second tier.

Elsewhere: a kill (1) in `test_train.py`, the supervisor (8) in `test_supervise.py`, mistakes (9) in
`test_bad_input.py`, files of others (10) in `test_fuzz.py` and `data/test_prepare.py`.
"""

import json
import re
import shutil
import signal
import time

import pytest

from tests.runs import (
    EVERY,
    LOG_EVERY,
    STEPS,
    contents,
    dense_command,
    dense_run,
    finish,
    read_metrics,
    run,
    same_end,
    saved,
    start,
    tiny_config,
    truncate_state,
    untimed,
)


def heartbeat(workdir):
    path = workdir / "heartbeat.json"
    return json.loads(path.read_text()) if path.exists() else {"status": None, "step": None}


def wait_for(process, condition):
    """Waits until `condition()` holds; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_line(stderr):
    return stderr.strip().splitlines()[-1]


INTERRUPT = pytest.param(2, 130, "interrupted", marks=pytest.mark.slow)


@pytest.mark.parametrize(("number", "status", "word"), [(15, 0, "preempted"), INTERRUPT])
def test_asked_to_stop_while_training(tmp_path, number, status, word):
    process = start(dense_command(tmp_path / "run"))
    wait_for(process, lambda: saved(tmp_path / "run", EVERY))
    process.send_signal(number)
    returned, _, stderr = finish(process)
    assert returned == status, stderr
    said = re.fullmatch(
        rf"{word}: saved at step (\d+) of {STEPS}; the same command goes on from there",
        last_line(stderr),
    )
    step = int(said[1])
    assert (tmp_path / "run" / "checkpoints" / str(step)).exists()
    assert (heartbeat(tmp_path / "run")["status"], heartbeat(tmp_path / "run")["step"]) == (
        word,
        step,
    )
    returned, _, stderr = run(dense_command(tmp_path / "run"))
    assert (
        returned == 0
        and f"going on from step {step}" in stderr
        and last_line(stderr)[9:].startswith("done: ")
    )
    assert heartbeat(tmp_path / "run")["status"] == "finished"
    assert same_end(tmp_path / "run", dense_run())


# Its validation lasts until the signal has come, so that it comes in the middle.
SLOW_VALIDATION = """
import os, signal, sys, time
import train
from aoe_jax import cli
from aoe_jax.training import validation
batches = validation.eval_batches
def slow(*arguments):
    for n, batch in enumerate(batches(*arguments)):
        yield batch
        if n == 1 and {condition}:
            os.kill(os.getpid(), signal.SIGTERM)
validation.eval_batches = slow
cli.run(train.main)
"""


def patched(code, workdir, **changes):
    """The command line of a training whose program is changed by `code`."""
    return ["-c", code, *dense_command(workdir, **changes)[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_asked_to_stop_while_validating(tmp_path, last):
    """The interrupted validation is repeated, also if it is the last."""
    workdir = tmp_path / "run"
    lines = (
        f"sum(1 for line in open({str(workdir / 'metrics.jsonl')!r}) if 'validation_nll' in line)"
    )
    stopped_at = STEPS if last else 10
    code = SLOW_VALIDATION.format(condition=f"{lines} == {2 if last else 0}")
    status, _, stderr = run(patched(code, workdir))
    assert status == 0 and last_line(stderr).startswith(
        f"preempted: saved at step {stopped_at} of"
    ), stderr
    assert not (workdir / "summary.json").exists()
    status, _, stderr = run(dense_command(workdir))
    assert status == 0, stderr
    assert same_end(workdir, dense_run())


@pytest.mark.slow
def test_asked_to_stop_before_training(tmp_path):
    """The first step is taken and saved."""
    code = "import os, signal, train\nfrom aoe_jax import cli\nfrom aoe_jax.training import loop\n"
    code += "new = loop.new_state\n"
    code += "loop.new_state = lambda *a: os.kill(os.getpid(), signal.SIGTERM) or new(*a)\n"
    code += "cli.run(train.main)"
    status, _, stderr = run(patched(code, tmp_path / "run"))
    assert status == 0 and last_line(stderr).startswith("preempted: saved at step 1 of"), stderr
    status, _, stderr = run(dense_command(tmp_path / "run"))
    assert status == 0 and same_end(tmp_path / "run", dense_run()), stderr


POISONED = """
import numpy as np
import train
from aoe_jax import cli
from aoe_jax.training import loop
batches = loop.train_batches
class Poisoned:
    def __init__(self, data): self.data = iter(data)
    def __iter__(self): return self
    def __getattr__(self, name): return getattr(self.data, name)
    def __next__(self):
        batch = next(self.data)
        if self.data.get_state()["next_index"] in {bad}:
            batch["weights"][0, 0] = np.nan
        return batch
loop.train_batches = lambda *arguments: Poisoned(batches(*arguments))
cli.run(train.main)
"""


def test_batch_that_is_not_finite(tmp_path):
    """It updates nothing, is counted and named; a kill in between changes none of this."""
    code = POISONED.format(bad="(5, 6, 13)")
    status, _, stderr = run(patched(code, tmp_path / "whole"))
    assert status == 0, stderr
    assert (
        "step 5 skipped: loss nan, gradient norm nan; its batch is number 5, sequences 16 to 19"
        in stderr
    )
    assert stderr.count("skipped:") == 3
    lines, _ = read_metrics(tmp_path / "whole")
    assert [line["skipped"] for line in lines] == [0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert lines[2]["loss"] is None and lines[3]["loss"] < lines[0]["loss"]
    assert not (tmp_path / "whole" / "checkpoints" / "6").exists()

    process = start(patched(code, tmp_path / "killed"))
    wait_for(process, lambda: (heartbeat(tmp_path / "killed")["step"] or 0) >= 8)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    status, _, stderr = run(patched(code, tmp_path / "killed"))
    assert status == 0, stderr
    assert same_end(tmp_path / "killed", tmp_path / "whole")


# A save lasts longer than the steps after it, until training cannot get on.
SLOW_SAVES = """
import os, time
def slowly(move):
    def moved(source, *arguments, **options):
        if "orbax-checkpoint-tmp" in os.fspath(source):
            time.sleep(1)
        return move(source, *arguments, **options)
    return moved
os.rename, os.replace = slowly(os.rename), slowly(os.replace)
"""


@pytest.mark.slow
def test_run_that_cannot_get_on(tmp_path):
    changes = {"train__max_skipped": 3, "checkpoint__every": 4}
    command = patched(
        SLOW_SAVES + POISONED.format(bad="range(10, 99)"), tmp_path / "run", **changes
    )
    for again in (False, True):
        status, _, stderr = run(command)
        assert status == 4 and "Traceback" not in stderr, stderr
        assert last_line(stderr).startswith(
            "error: stopped at step 12: the last 3 updates were skipped"
        )
        assert ("going on from step 8" in stderr) == again
        assert heartbeat(tmp_path / "run")["status"] == "diverged"
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"4", "8"}
    # With better data it goes on.
    status, _, stderr = run(dense_command(tmp_path / "run", **changes))
    assert status == 0, stderr


def test_damaged_newest_checkpoint(tmp_path):
    workdir = shutil.copytree(dense_run(), tmp_path / "run")
    (workdir / "summary.json").unlink()
    truncate_state(workdir)
    status, _, stderr = run(dense_command(workdir))
    assert status == 0, stderr
    assert (
        f"checkpoint of step {STEPS} is damaged" in stderr
        and f"going on from step {STEPS - EVERY}" in stderr
    )
    assert (workdir / "damaged_checkpoints" / str(STEPS)).is_dir()
    assert same_end(workdir, dense_run())


def test_two_runs_begin_in_one_workdir(tmp_path):
    """Neither finds the folder at its start: one of them trains, the other changes nothing."""
    processes = [
        start(dense_command(tmp_path / "run", train__learning_rate=rate)) for rate in (0.003, 0.01)
    ]
    outcomes = [finish(process) for process in processes]
    statuses = sorted(status for status, _, _ in outcomes)
    assert statuses in ([0, 5], [0, 2]), outcomes  # 2: the first has finished meanwhile
    winner = [status for status, _, _ in outcomes].index(0)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["train"]["learning_rate"]
        == (0.003, 0.01)[winner]
    )
    assert [line["step"] for line in read_metrics(tmp_path / "run")[0]] == list(
        range(2, STEPS + 1, 2)
    )


@pytest.mark.slow
def test_an_owner_that_is_suspended(tmp_path):
    """Another process takes the run over; the first one stops when it goes on."""
    workdir = tmp_path / "run"
    settings = {"train__steps": 10**6, "train__log_every": 1}
    first = start([*dense_command(workdir, **settings), "--retry_seconds=1"])
    wait_for(first, lambda: heartbeat(workdir)["status"] == "training")
    first.send_signal(signal.SIGSTOP)
    (workdir / "config.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "heartbeat.json").write_text("{}")
    status, _, stderr = run(dense_command(workdir))
    assert status == 0 and "was taken over from process" in stderr, stderr
    whole = {name: text for name, text in contents(workdir).items() if "events" not in name}
    first.send_signal(signal.SIGCONT)
    status, _, stderr = finish(first)
    assert status == 5 and "owner.lease is gone" in last_line(stderr), stderr
    assert whole.items() <= contents(workdir).items() and same_end(workdir, dense_run())


def test_a_second_request_to_stop_ends_at_once(tmp_path):
    """The save of the first one, which never ends, is given up."""
    code = SLOW_SAVES.replace("sleep(1)", "sleep(3600)") + "import train\n"
    code += "from aoe_jax import cli\ncli.run(train.main)"
    process = start(patched(code, tmp_path / "run"))
    wait_for(process, lambda: heartbeat(tmp_path / "run")["status"] == "training")
    process.send_signal(signal.SIGTERM)
    wait_for(process, lambda: heartbeat(tmp_path / "run")["status"] == "saving")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM


PASSING_FAULT = """
import errno, os
import train
from aoe_jax import cli
from aoe_jax.training import writers
sync, left = os.fsync, {failures}
def faulty(file):
    global left
    left -= 1
    if left >= 0:
        raise OSError(errno.EIO, "Input/output error")
    sync(file)
writers.os.fsync = faulty
cli.run(train.main)
"""


@pytest.mark.parametrize("failures", [3, pytest.param(10**6, marks=pytest.mark.slow)])
def test_a_fault_of_the_disk(tmp_path, failures):
    """It is retried; a lasting one ends the run, and the next start goes on."""
    seconds = 60 if failures == 3 else 0.1
    command = patched(PASSING_FAULT.format(failures=failures), tmp_path / "run")
    status, _, stderr = run([*command, f"--retry_seconds={seconds}"])
    assert "cannot be written (Input/output error)" in stderr
    if failures > 3:
        assert status == 5 and "it was tried for 0.1 s" in last_line(stderr), stderr
        status, _, stderr = run(dense_command(tmp_path / "run"))
    assert status == 0 and same_end(tmp_path / "run", dense_run()), stderr


HANG = """
import os
import train
from aoe_jax import cli
from aoe_jax.training import loop
evaluate = loop.evaluate
def read_that_hangs(*arguments):
    os.read(os.pipe()[0], 1)
loop.evaluate = read_that_hangs
cli.run(train.main)
"""


def test_a_hang(tmp_path):
    """It hangs in its first validation, after the checkpoint of step 9."""
    workdir = tmp_path / "run"
    status, _, stderr = run(patched(HANG, workdir, train__hang_timeout=3))
    assert status == 6 and "(validating, after step 10) made no progress" in last_line(stderr)
    assert "read_that_hangs" in (workdir / "hang" / "process_0.txt").read_text()
    status, _, stderr = run(dense_command(workdir))
    assert status == 0 and "going on from step 9" in stderr, stderr
    assert same_end(workdir, dense_run())


@pytest.mark.slow
def test_saves_by_the_clock(tmp_path):
    """They change nothing of what is computed."""
    changes = {"checkpoint__every": 100, "checkpoint__every_minutes": 1e-6, "checkpoint__keep": 99}
    workdir = tmp_path / "run"
    status, _, stderr = run(dense_command(workdir, **changes))
    assert status == 0, stderr
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved == [*range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
    assert same_end(workdir, dense_run())


@pytest.mark.slow
def test_unforeseen_exception_has_a_last_line(tmp_path):
    code = "import train\nfrom aoe_jax import cli\nfrom aoe_jax.training import loop\n"
    code += "def fail(*_): raise RuntimeError('the machine is on fire')\n"
    code += "loop.evaluate = fail\ncli.run(train.main)"
    status, _, stderr = run(patched(code, tmp_path / "run"))
    assert status == 1 and "Traceback" in stderr
    assert last_line(stderr) == (
        "failed: RuntimeError: the machine is on fire; after step 10; the same command goes on "
        "from the newest checkpoint"
    )
    assert heartbeat(tmp_path / "run")["status"] == "failed"


def test_a_run_that_ends_where_it_goes_back_to(tmp_path):
    """The last step, which was never validated, is validated now."""
    workdir, last = shutil.copytree(dense_run(), tmp_path / "run"), STEPS - EVERY
    status, _, stderr = run([*dense_command(workdir, train__steps=last), f"--go-back={last}"])
    assert status == 0, stderr
    assert [line["step"] for line in read_metrics(workdir)[1]] == [10, 20, last]


def test_history_is_not_erased(tmp_path):
    """A run whose checkpoints are gone stops, until its user says how to begin."""
    workdir = shutil.copytree(dense_run(), tmp_path / "run")
    shutil.move(workdir / "checkpoints", tmp_path / "checkpoints")
    before = contents(workdir)
    longer = dense_command(workdir, train__steps=STEPS + 2)
    status, _, stderr = run(longer)
    assert status == 2 and contents(workdir) == before, stderr
    assert (
        f"shows that a checkpoint of step {STEPS} was complete, but checkpoints/ has none. Bring "
        "the missing ones back; or --start-over begins anew" in last_line(stderr)
    )
    shutil.move(tmp_path / "checkpoints", workdir / "checkpoints")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    status, _, stderr = run(longer)
    assert status == 2 and f"or --go-back={STEPS - EVERY} continues from that" in last_line(stderr)
    status, _, stderr = run([*longer, "--go-back=5"])
    assert status == 2 and f"--go-back=5: {workdir} has checkpoints of steps" in last_line(stderr)

    status, _, stderr = run([*longer, f"--go-back={STEPS - EVERY}"])
    assert status == 0 and f"going on from step {STEPS - EVERY}" in stderr, stderr
    (aside,) = (workdir / "set_aside").iterdir()
    assert (aside / "metrics.jsonl.whole").read_bytes() == before["metrics.jsonl"]
    training, _ = untimed(workdir)
    before_that = (STEPS - EVERY) // LOG_EVERY
    assert training[:before_that] == untimed(dense_run())[0][:before_that]

    status, _, stderr = run([*dense_command(workdir), "--start-over"])
    assert status == 0 and "going on" not in stderr, stderr
    assert same_end(workdir, dense_run())
    assert len([*(workdir / "set_aside").iterdir()]) == 2


@pytest.mark.slow
def test_exported_model_scores_as_its_run(tmp_path):
    whole = shutil.copytree(dense_run(), tmp_path / "run")
    model = f"--output={tmp_path / 'model'}"
    command = ["-m", "aoe_jax.export", f"--workdir={whole}", model]
    status, _, stderr = run(command)
    assert status == 0, stderr
    cache = tmp_path / ".cache" / "aoe_jax"  # where a model finds what was tokenised before
    cache.parent.mkdir()
    cache.symlink_to(tiny_config().data.cache)
    for workdir in (whole, tmp_path / "model"):
        evaluation = ["eval.py", f"--workdir={workdir}", "--split=validation"]
        status, _, stderr = finish(start(evaluation, forked=False, HOME=str(tmp_path)))
        assert status == 0, stderr
    reports = [json.loads((path / "eval.json").read_text()) for path in (whole, tmp_path / "model")]
    assert reports[0] == reports[1]
    assert reports[0]["nll"] == read_metrics(whole)[1][-1]["validation_nll"]
    status, _, stderr = run(command)
    assert status == 2 and f"{model} exists already" in stderr
    status, _, stderr = run(dense_command(tmp_path / "model"))
    assert (
        status == 2
        and "belongs to a model, not to a training run; train.init_from starts" in stderr
    )

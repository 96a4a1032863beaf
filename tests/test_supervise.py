"""The supervisor, over commands that end in every way, and over a real run that is killed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aoe_jax import supervise as supervise_module
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage.files import read_json
from aoe_jax.supervise import Supervisor, _without, _workdir_of
from tests.hasty import xla_flags
from tests.runs import ROOT, dense_command, dense_run, same_end
from tests.test_faults import heartbeat, wait_for

# Ends each attempt as told: exit status, status of the heartbeat, steps that it adds.
SCRIPT = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1].partition("=")[2])
workdir.mkdir(exist_ok=True)
plan = json.loads(sys.argv[2])
path, count = workdir / "heartbeat.json", workdir / "count"
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
with (workdir / "given").open("a") as given:
    print(*sys.argv[3:], file=given)
status, word, steps = plan[min(number, len(plan) - 1)]
name = "copied" if word == "copied" else "saved"
before = json.loads(path.read_text()) if path.exists() else {}
history = before.get("history") if word == "another's" else number
found = {"status": word, name: before.get(name, 0) + steps, "time": time.time()}
if word != "silent":
    path.write_text(json.dumps(found | {"history": history}))
if status == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (workdir / "waits").touch()
    time.sleep(60)
if word == "gone":
    time.sleep(1)
    workdir.rename(workdir.with_name("aside"))
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def supervise(tmp_path, plan, restarts=2, flags=()):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "aoe_jax.supervise", f"--restarts={restarts}", "--pause=0.01"),
            *("--", str(script), f"--workdir={tmp_path / 'run'}", json.dumps(plan), *flags),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def attempts(workdir):
    (file,) = (workdir / "attempts").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("plan", "status", "count"),
    [
        ([(0, "finished", 5)], 0, 1),
        ([(0, "preempted", 5), (5, "failed", 0), (6, "training", 1), (0, "finished", 1)], 0, 4),
        ([(-9, "training", 3), (1, "failed", 0), (0, "finished", 1)], 0, 3),
        ([(2, "failed", 3)], 2, 1),
        ([(4, "diverged", 3)], 4, 1),
        ([(130, "interrupted", 3)], 130, 1),
        ([(5, "failed", 0)], 5, 3),
        ([(5, "failed", 1), (5, "failed", 0), (5, "failed", 0), (5, "failed", 0)], 5, 4),
        ([(5, "copied", 1), (5, "copied", 0), (5, "copied", 0), (5, "copied", 0)], 5, 4),
    ],
)
def test_what_is_started_again(tmp_path, plan, status, count):
    process = supervise(tmp_path, plan)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    lines = attempts(tmp_path / "run")
    done = [plan[min(i, len(plan) - 1)] for i in range(count)]  # the last is repeated
    codes = [status if status >= 0 else 128 - status for status, _, _ in done]
    assert [line["exit_status"] for line in lines] == codes
    assert lines[-1]["saved"] == sum(steps for _, _, steps in done)
    assert ("gave up: 3 attempts in a row" in stderr) == (status == 5)


def test_a_run_goes_back_until_it_has_begun(tmp_path):
    """An attempt that fails before has not gone back, also if the former process still saves."""
    (tmp_path / "run").mkdir()
    heartbeat = {"status": "diverged", "saved": 3, "time": 1.5, "history": 7}
    (tmp_path / "run" / "heartbeat.json").write_text(json.dumps(heartbeat))
    plan = [(5, "silent", 0), (5, "another's", 0), (5, "failed", 1), (0, "finished", 1)]
    process = supervise(tmp_path, plan, flags=["--take-over", "--go-back=2"])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    given = (tmp_path / "run" / "given").read_text().splitlines()
    assert given == ["--take-over --go-back=2", "--go-back=2", "--go-back=2", "--resume-only"]


def test_killed_after_the_end_of_the_run(tmp_path):
    process = supervise(tmp_path, [(-signal.SIGKILL, "finished", 3)])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and len(attempts(tmp_path / "run")) == 1, stderr


def test_a_finished_run_that_gets_more_steps_has_not_finished_again(tmp_path):
    (tmp_path / "run").mkdir()
    heartbeat = {"status": "finished", "saved": 3, "time": 1.5}
    (tmp_path / "run" / "heartbeat.json").write_text(json.dumps(heartbeat))
    process = supervise(tmp_path, [(-signal.SIGKILL, "silent", 0), (0, "finished", 1)])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and len(attempts(tmp_path / "run")) == 2, stderr


def test_asked_to_stop(tmp_path):
    process = supervise(tmp_path, [("wait", "preempted", 1)])
    wait_for(process, (tmp_path / "run" / "waits").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(attempts(tmp_path / "run")) == 1


@pytest.mark.parametrize("plan", [[(5, "failed", 1)], []], ids=["later", "first_attempt"])
def test_a_run_whose_disk_is_gone(tmp_path, plan):
    """Nothing is started before it is there again."""
    process = supervise(tmp_path, [*plan, (5, "gone", 1), (0, "finished", 1)], 12)
    wait_for(process, (tmp_path / "aside").exists)
    time.sleep(0.5)
    assert not (tmp_path / "run").exists()
    (tmp_path / "aside").rename(tmp_path / "run")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "run/heartbeat.json is gone; is its disk" in stderr, stderr
    assert (tmp_path / "run" / "count").read_text() == str(len(plan) + 2)
    given = (tmp_path / "run" / "given").read_text().splitlines()
    assert given == ["", *["--resume-only"] * (len(plan) + 1)]


def test_a_disk_that_fails_is_no_sign_of_a_run(monkeypatch):
    """The command is started: only a heartbeat that was there can be gone."""
    answers = [OSError(5, "I/O error"), False, False]

    class Disk:
        def __truediv__(self, name):
            return self

        def exists(self):
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    supervisor, started = Supervisor(["train.py"], Disk()), []
    monkeypatch.setattr(supervisor, "_attempt", lambda n: (started.append(n), (2, 0))[1])
    assert supervisor.run(restarts=0, pause=0) == 2 and started == [1]


@pytest.mark.parametrize(
    "content",
    ["[]", "null", '{"saved": "x"}', '{"saved": 1e400}', '{"saved": true}', "[" * 10**5, None],
)
def test_a_heartbeat_of_somebody_else_counts_as_none(tmp_path, monkeypatch, content):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if content is None:
        os.mkfifo(tmp_path / "heartbeat.json")
    else:
        (tmp_path / "heartbeat.json").write_text(content)
    assert Supervisor(["-c", "raise SystemExit(2)"], tmp_path).run(restarts=0, pause=0) == 2


def test_nothing_starts_while_the_first_heartbeat_cannot_be_read(tmp_path, monkeypatch):
    """Later it would not be known whether the run has begun anew."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "heartbeat.json").write_text('{"status": "finished", "history": 7}')
    supervisor, commands = Supervisor(["train.py", "--start-over"], tmp_path), []
    answers = [MachineFault("it cannot be read"), None]

    def read(*arguments, **options):
        if answers and (error := answers.pop(0)):
            raise error
        return read_json(*arguments, **options)

    def attempt(number):
        commands.append((number, supervisor._command))
        return UserError.status, 0

    monkeypatch.setattr(supervise_module, "read_json", read)
    monkeypatch.setattr(supervisor, "_attempt", attempt)
    assert supervisor.run(restarts=1, pause=0) == 2
    assert [(number, command[1:]) for number, command in commands] == [
        (2, ["train.py", "--start-over"])
    ]


def test_the_pause_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    supervisor, pauses = Supervisor(["train.py"], tmp_path), []
    monkeypatch.setattr(supervisor, "_attempt", lambda _: (5, 0))
    monkeypatch.setattr(supervisor._asked_to_stop, "wait", pauses.append)
    assert supervisor.run(restarts=1100, pause=5.0) == 5
    assert pauses[:5] == [5, 10, 20, 40, 60] and pauses[-1] == 60 and len(pauses) == 1100


def test_a_command_that_cannot_be_started(tmp_path, monkeypatch):
    """It is tried again after a fault, with all its flags; not if its program is missing."""
    popen, codes, given = subprocess.Popen, [errno.EMFILE, errno.EAGAIN], []

    def start(command, **options):
        given.append(command[-1])
        if codes:
            code = codes.pop()
            raise OSError(code, os.strerror(code))
        return popen(command, **options)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(subprocess, "Popen", start)
    supervisor = Supervisor(["-c", "raise SystemExit(2)", "--take-over"], tmp_path)
    assert supervisor.run(restarts=2, pause=0) == 2 and given == ["--take-over"] * 3
    assert [line["exit_status"] for line in attempts(tmp_path)] == [5, 5, 2]
    codes.append(errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        supervisor.run(restarts=2, pause=0)


@pytest.mark.parametrize("kind", ["FIFO", "link"])
def test_attempts_are_written_to_a_file_of_the_run_only(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "attempts").mkdir()
    file = tmp_path / "attempts" / f"{socket.gethostname()}.jsonl"
    if kind == "FIFO":
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / "mine")
    assert Supervisor(["-c", "raise SystemExit(2)"], tmp_path).run(restarts=0, pause=0) == 2
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_last_workdir_counts(tmp_path):
    command = ["train.py", "--workdir=a", "--workdir", "b", "-workdir=c"]
    assert _workdir_of(command) == Path("c") and _workdir_of(command[:-1]) == Path("b")
    with pytest.raises(UserError, match="no --workdir"):
        _workdir_of(["train.py", "--workdir=", "--config=x"])


def test_flags_of_the_first_attempt():
    command = ["train.py", "--start-over", "--go-back", "7", "--go_back=8", "--workdir=a", "--x"]
    names = ("start-over", "go-back")
    assert _without(names, command) == ["train.py", "--workdir=a", "--x"]


def test_without_a_command():
    for command, words in ((["--"], "name a command after --"), (["--", "x.py"], "no --workdir")):
        done = subprocess.run(
            [sys.executable, "-m", "aoe_jax.supervise", *command],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 2 and words in done.stderr


def test_a_run_that_is_killed_twice(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "aoe_jax.supervise", "--pause=0.1", "--", *dense_command(workdir)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags()},
        stderr=subprocess.PIPE,
        text=True,
    )
    for step in (6, 15):
        wait_for(process, lambda step=step: (heartbeat(workdir).get("saved") or 0) >= step)
        subprocess.run(["kill", "-9", str(heartbeat(workdir)["pid"])], check=False)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert same_end(workdir, dense_run())
    assert [line["exit_status"] for line in attempts(workdir)] == [137, 137, 0]


def test_a_supervisor_that_is_killed(tmp_path):
    """Its run saves and ends too; another supervisor, started at once, waits for that."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "aoe_jax.supervise", "--pause=1", "--restarts=99"]
    command += ["--", *dense_command(workdir)]
    options = {"cwd": ROOT, "env": os.environ | {"XLA_FLAGS": xla_flags()}}
    first, second = (tmp_path / name for name in ("first", "second"))
    with first.open("w") as file:
        process = subprocess.Popen(command, **options, stderr=file)
    wait_for(process, lambda: (heartbeat(workdir)["step"] or 0) > 0)
    pid = heartbeat(workdir)["pid"]
    os.kill(pid, signal.SIGSTOP)  # as slow as a large save
    process.kill()
    process.wait()
    with second.open("w") as file:
        successor = subprocess.Popen(command, **options, stderr=file)
    wait_for(successor, lambda: "attempt 1 ended with status 5" in second.read_text())
    assert f"is in use by process {pid}" in second.read_text()
    os.kill(pid, signal.SIGCONT)
    assert successor.wait(timeout=900) == 0, second.read_text()
    assert "preempted: saved at step" in first.read_text(), first.read_text()
    assert "going on from step" in second.read_text()
    assert same_end(workdir, dense_run())

"""The supervisor restarts commands that end in different ways, and a real run that is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from aoe_jax.errors import UserError
from aoe_jax.storage import retry
from aoe_jax.supervise import Supervisor
from tests.hasty import xla_flags
from tests.runs import ROOT, SLOW_SAVES, dense_run, heartbeat, patched, same_end, wait_for

# Each attempt ends with its (exit status, status of the heartbeat, number of new steps).
SCRIPT = """
import json, os, pathlib, signal, sys, time
plan = json.loads(sys.argv[1])
(workdir,) = (pathlib.Path(a[10:]) for a in sys.argv if a.startswith("--workdir="))
workdir.mkdir(exist_ok=True)
path, count = workdir / "heartbeat.json", workdir / "count"
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
with (workdir / "given").open("a") as given:
    print(*(a for a in sys.argv[2:] if not a.startswith("--workdir=")), file=given)
status, word, steps = plan[min(number, len(plan) - 1)]
before = json.loads(path.read_text()) if path.exists() else {}
found = {"status": word, "saved": before.get("saved", 0) + steps, "time": time.time()}
if word != "silent":
    path.write_text(json.dumps(found))
if word == "moves":
    (workdir / "set_aside" / "now").mkdir(parents=True)
if status == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (workdir / "waits").touch()
    time.sleep(60)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def signals_of_the_tests(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)


def command(folder, plan, *flags):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [str(script), json.dumps(plan), f"--workdir={folder / 'run'}", *flags]


def attempts(workdir):
    files = (workdir / "attempts").glob("*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


IDLE = (5, "failed", 0)  # an attempt without a new checkpoint


@pytest.mark.parametrize(
    ("plan", "status", "count"),
    [
        ([(0, "finished", 5)], 0, 1),
        ([(0, "preempted", 5), IDLE, (6, "training", 1), (0, "finished", 1)], 0, 4),
        ([(-9, "training", 3), (1, "failed", 0), (0, "finished", 1)], 0, 3),
        ([IDLE, IDLE, (5, "failed", 1), IDLE, IDLE, (0, "finished", 1)], 0, 6),
        ([(-9, "finished", 3)], 0, 1),  # killed after the end of the run
        ([(2, "failed", 3)], 2, 1),
        ([(4, "diverged", 3)], 4, 1),
        ([(130, "interrupted", 3)], 130, 1),
        ([IDLE], 5, 3),
        ([(0, "preempted", 0)], 5, 3),
        ([(5, "failed", 1), IDLE, IDLE, IDLE], 5, 4),
    ],
)
def test_what_is_started_again(tmp_path, plan, status, count, caplog):
    assert Supervisor(command(tmp_path, plan)).run(restarts=2, pause=0.01) == status
    lines = attempts(tmp_path / "run")
    done = [plan[min(i, len(plan) - 1)] for i in range(count)]  # the last entry is repeated
    codes = [status if status >= 0 else 128 - status for status, _, _ in done]
    assert [line["exit_status"] for line in lines] == codes
    assert lines[-1]["saved"] == sum(steps for _, _, steps in done)
    assert ("gave up: 3 attempts in a row" in caplog.text) == (status == 5)


@pytest.mark.parametrize(
    ("flags", "given"),
    [(["--go-back", "2"], "--go-back=2"), (["-start-over=true"], "--start-over")],
)
def test_files_are_moved_once(tmp_path, flags, given):
    """Restarts repeat the flag until files are moved, also if an older process saves meanwhile."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heartbeat.json").write_text('{"status": "finished", "saved": 3}')
    plan = [(5, "silent", 0), (5, "failed", 1), (5, "moves", 0), (0, "finished", 1)]
    supervisor = Supervisor(command(tmp_path, plan, *flags))
    assert supervisor.run(restarts=2, pause=0) == 0
    lines = (tmp_path / "run" / "given").read_text().splitlines()
    assert lines == [given, given, given, ""]


def test_a_new_run_starts_over_once(tmp_path):
    plan = [(5, "failed", 1), (0, "finished", 1)]
    assert Supervisor(command(tmp_path, plan, "--start-over")).run(restarts=2, pause=0) == 0
    assert (tmp_path / "run" / "given").read_text().splitlines() == ["--start-over", ""]


@pytest.mark.parametrize("content", ["[]", '{"saved": true}'])
def test_a_heartbeat_of_somebody_else_counts_as_none(tmp_path, content):
    (tmp_path / "heartbeat.json").write_text(content)
    given = ["-c", "raise SystemExit(2)", f"--workdir={tmp_path}"]
    assert Supervisor(given).run(restarts=0, pause=0) == 2


def test_a_run_that_other_processes_finish_meanwhile(tmp_path, monkeypatch):
    """Another attempt of this process alone would wait for the others in vain."""
    supervisor = Supervisor(command(tmp_path, [(-9, "saving", 1)]))

    def pause(seconds):
        (tmp_path / "run" / "heartbeat.json").write_text('{"status": "finished", "saved": 1}')

    monkeypatch.setattr(supervisor._asked_to_stop, "wait", pause)
    assert supervisor.run(restarts=2, pause=0) == 0
    assert len(attempts(tmp_path / "run")) == 1


def test_the_pause_stays_bounded(tmp_path, monkeypatch):
    supervisor, pauses = Supervisor(["train.py", f"--workdir={tmp_path}"]), []
    monkeypatch.setattr(supervisor, "_attempt", lambda: 5)
    monkeypatch.setattr(supervisor._asked_to_stop, "wait", pauses.append)
    assert supervisor.run(restarts=1100, pause=5.0) == 5
    assert pauses[:5] == [5, 10, 20, 40, 60] and pauses[-1] == 60 and len(pauses) == 1100


def test_the_last_workdir_counts():
    given = ["train.py", "--workdir=a", "--workdir", "b", "-workdir=c"]
    assert Supervisor(given)._workdir == Path("c") and Supervisor(given[:-1])._workdir == Path("b")
    for given, words in (
        ([], "no --workdir"),
        (["train.py", "--config=x"], "no --workdir"),
        (["train.py", "--workdir=", "--config=x"], "no --workdir"),
    ):
        with pytest.raises(UserError, match=words):
            Supervisor(given)


def started(*command):
    """Starts the supervisor of a command in a process."""
    program = [sys.executable, "-m", "aoe_jax.supervise", "--pause=0.1", "--", *command]
    environment = os.environ | {"XLA_FLAGS": xla_flags()}
    return subprocess.Popen(program, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_asked_to_stop(tmp_path):
    process = started(*command(tmp_path, [("wait", "preempted", 1)]))
    wait_for(process, (tmp_path / "run" / "waits").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(attempts(tmp_path / "run")) == 1


def test_asked_to_stop_before_the_command_starts(tmp_path):
    supervisor = Supervisor(command(tmp_path, [("wait", "preempted", 1)]))
    supervisor._asked_to_stop.set()
    assert supervisor.run(restarts=2, pause=0) in (0, 128 + signal.SIGTERM)
    supervisor._process = mock.Mock()
    supervisor._pass_on(signal.SIGHUP, None)  # JAX's own handler knows only SIGTERM
    supervisor._process.send_signal.assert_called_once_with(signal.SIGTERM)


@pytest.mark.parametrize("of_hangup", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_supervisor_under_nohup_ignores_sighup(tmp_path, monkeypatch, of_hangup):
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, _: handled.append(number))
    monkeypatch.setattr(signal, "getsignal", lambda _: of_hangup)
    Supervisor(["train.py", f"--workdir={tmp_path}"])
    hangup = [signal.SIGHUP] if of_hangup == signal.SIG_DFL else []
    assert sorted(handled) == sorted([signal.SIGTERM, signal.SIGINT, *hangup])


@pytest.mark.slow
def test_a_run_that_is_killed_twice(tmp_path):
    """It is killed as soon as its heartbeat names a checkpoint, which is complete by then."""
    workdir = tmp_path / "run"
    process = started(*patched(SLOW_SAVES.format(seconds=0.5), workdir))
    for step in (6, 15):
        wait_for(process, lambda step=step: (heartbeat(workdir).get("saved") or 0) >= step)
        os.kill(heartbeat(workdir)["pid"], signal.SIGKILL)
        wait_for(process, lambda step=step: len(attempts(workdir)) > step // 10)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert same_end(workdir, dense_run())
    assert [line["exit_status"] for line in attempts(workdir)] == [137, 137, 0]

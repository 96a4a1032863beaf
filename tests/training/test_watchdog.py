"""When the watchdog ends a process, without real hangs: `tests/test_hangs.py` has those."""

import contextlib
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from aoe_jax.errors import Hang, Preempted
from aoe_jax.storage.files import write_json
from aoe_jax.training import watchdog
from aoe_jax.training.health import Heartbeat


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which the process would have ended."""
    statuses = []

    def end(status):
        statuses.append(status)
        threading.Event().wait()  # for ever

    monkeypatch.setattr(watchdog.os, "_exit", end)
    return statuses


def watched(workdir, status, terminated=None, timeout=0):
    heartbeat = Heartbeat(workdir)
    heartbeat.beat(status, 3)
    folder = SimpleNamespace(workdir=workdir, nonce=1, release=lambda: None)
    stop = SimpleNamespace(terminated=terminated)
    return heartbeat, watchdog.Watchdog(folder, heartbeat, stop, timeout)


def until(holds):
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_a_step_has_the_time_of_others_after_a_sigterm(tmp_path, monkeypatch, ended):
    monkeypatch.setattr(watchdog, "TERM_SECONDS", 0.1)
    heartbeat, dog = watched(tmp_path, "training", time.monotonic())
    time.sleep(1)
    heartbeat.beat("training", 4)
    assert heartbeat.slowest >= 1
    with dog:
        time.sleep(0.5)
        assert not ended
        assert until(lambda: ended == [Preempted.status])


def test_a_save_goes_on_after_a_sigterm(tmp_path, monkeypatch, ended):
    monkeypatch.setattr(watchdog, "TERM_SECONDS", 0.1)
    heartbeat, dog = watched(tmp_path, "saving", time.monotonic())
    with dog:
        time.sleep(1)
        assert not ended
        heartbeat.beat("training", 4)
        assert until(lambda: ended == [Preempted.status])


@pytest.mark.parametrize("status", ["preparing", "compiling"])
def test_what_has_no_limit(tmp_path, ended, status):
    heartbeat, dog = watched(tmp_path, status, timeout=0.1)
    with dog:
        time.sleep(1)
        assert not ended
        heartbeat.beat("training", 4)
        assert until(lambda: ended == [Hang.status])


def test_processes_that_do_not_know_their_step_yet(tmp_path, monkeypatch, ended, capsys):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    heartbeat, dog = watched(tmp_path, "restoring", timeout=0.1)
    heartbeat.step = None
    (tmp_path / "hang").mkdir()
    write_json(tmp_path / "hang" / "process_1.json", {"nonce": 1, "step": 0, "status": "restoring"})
    with dog:
        assert until(lambda: ended == [Hang.status])
    assert "(train.hang_timeout=0.1): no process is behind; stacks are" in capsys.readouterr().err


@pytest.mark.parametrize("is_full", [True, False])
def test_output_that_nobody_reads(tmp_path, monkeypatch, ended, is_full):
    """The process ends although its last line cannot be written, nor its report."""
    reading, writing = os.pipe()
    if is_full:
        os.set_blocking(writing, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, bytes(2**16))
        os.set_blocking(writing, True)
    else:
        os.close(reading)
    (tmp_path / "hang").touch()
    stderr = open(writing, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stderr)
    with watched(tmp_path, "training", timeout=0.1)[1]:
        assert until(lambda: ended == [Hang.status])
    if is_full:
        os.close(reading)
    with contextlib.suppress(BrokenPipeError):
        stderr.close()

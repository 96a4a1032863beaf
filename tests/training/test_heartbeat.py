"""The heartbeat, and when it ends a process. `tests/test_fault_matrix.py` tests real hangs."""

import contextlib
import threading

import pytest
from etils import epath

from aoe_jax.errors import Hang, MachineFault
from aoe_jax.training import heartbeat as heartbeat_module
from aoe_jax.training.heartbeat import Heartbeat
from tests.runs import heartbeat as content
from tests.runs import wait_for


def test_heartbeat(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.beat("training", 3)
    assert not (tmp_path / "heartbeat.json").exists()  # this process does not own the folder yet
    heartbeat.begin(2, began=7.0)
    heartbeat.beat("training", 4)
    first = content(tmp_path)
    named = {name: first[name] for name in ("status", "step", "saved", "began")}
    assert named == {"status": "training", "step": 4, "saved": 2, "began": 7.0}
    assert first.keys() - named.keys() == {"time", "host", "pid"}
    heartbeat.beat("training", 5)  # less than a second later
    assert content(tmp_path) == first
    heartbeat.beat("saving")
    assert (content(tmp_path)["status"], content(tmp_path)["step"]) == ("saving", 5)
    heartbeat.begin(2, 7.0, is_owner=lambda: False)
    heartbeat.beat("validating")
    assert content(tmp_path)["status"] == "saving"


@pytest.mark.parametrize(("place", "pause"), [("run", 1), ("gs://bucket/run", 10)])
def test_a_status_is_written_again_after_a_pause(monkeypatch, place, pause):
    now, written = [100.0], []
    monkeypatch.setattr(heartbeat_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat_module, "write_json", lambda path, value: written.append(now[0]))
    heartbeat = Heartbeat(epath.Path(place), 0)
    heartbeat.begin(2, began=7.0)
    for _ in range(25):
        heartbeat.beat("training")
        now[0] += 1
    assert written == [*range(100, 125, pause)]


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("training", "failed", OSError),
        ("training", "training", MachineFault),  # another process may own the file
        ("finished", "finished", OSError),
    ],
)
def test_a_run_that_fails(tmp_path, before, after, kind):
    """A finished run stays finished, if another process is killed after the last status."""
    with pytest.raises(kind) as error, contextlib.ExitStack() as held:
        heartbeat = held.enter_context(Heartbeat(tmp_path, 0))
        held.push(heartbeat.end)
        heartbeat.begin(2, began=7.0)
        heartbeat.beat(before, 4)
        raise kind
    assert content(tmp_path)["status"] == after
    note = "after step 4; the same command goes on from the newest checkpoint"
    assert error.value.__notes__ == [note]


@pytest.fixture
def ended(monkeypatch):
    """Records the exit statuses with which the process would have ended."""
    statuses = []

    def end(status):
        statuses.append(status)
        threading.Event().wait()  # for ever

    monkeypatch.setattr(heartbeat_module.os, "_exit", end)
    return statuses


@pytest.mark.parametrize("can_report", [True, False])
def test_a_hang_ends_the_process(tmp_path, ended, capsys, can_report):
    """The process writes where it hangs, if it can. Preparing data and compiling have no limit."""
    if not can_report:
        (tmp_path / "hang").touch()
    with Heartbeat(tmp_path, 0.5) as heartbeat:
        looks, wait = [], heartbeat._ended.wait
        heartbeat._ended.wait = lambda seconds: looks.append(1) or wait(seconds)
        for unlimited in ("preparing", "compiling"):
            looks.clear()
            heartbeat.beat(unlimited, 3)
            wait_for(None, lambda: len(looks) > 5)
            assert not ended
        heartbeat.beat("training", 4)
        wait_for(None, lambda: ended == [Hang.status])
    words = "error: process 0 (training, after step 4) made no progress for "
    assert words in capsys.readouterr().err
    if can_report:
        report = (tmp_path / "hang" / "process_0.txt").read_text()
        assert words in report and "test_a_hang_ends_the_process" in report


def test_a_process_that_was_suspended_does_not_hang(tmp_path, ended, monkeypatch):
    now, looks = [100.0], []
    monkeypatch.setattr(heartbeat_module.time, "monotonic", lambda: now[0])
    with Heartbeat(tmp_path, 20.0) as heartbeat:
        wait = heartbeat._ended.wait
        heartbeat._ended.wait = lambda seconds: looks.append(1) or wait(seconds)
        wait_for(None, lambda: looks)
        now[0] += 3600
        looks.clear()
        wait_for(None, lambda: len(looks) > 3)
        assert not ended
    assert heartbeat._ended.is_set()  # after the run, nothing ends the process

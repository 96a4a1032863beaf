"""Owners of a folder: processes of this host, of other hosts, and several that come at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from aoe_jax.errors import InUse, MachineFault, UserError
from aoe_jax.storage import lease, retry
from aoe_jax.storage.lease import NAME, leased, token_of
from tests.runs import ROOT

MARK = "filelock/2\npid={pid}\nhost={host}\nmode=lease\ntoken={token}\nduration={duration}\n"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.0)
    monkeypatch.setattr(lease, "_SETTLE", 0.05)


def elsewhere(folder, host="tpu-3", token="aa", duration="1.0"):
    """Makes the file of an owner on another host."""
    folder.mkdir(exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    (folder / NAME).write_text(MARK.format(pid=11, host=host, token=token, duration=duration))


def test_one_owner_of_a_folder(tmp_path):
    folder = tmp_path / "run"
    with leased(folder, "workdir") as owner:
        owner.check()
        assert token_of(folder) == owner.token
        words = r"--workdir=.*/run is in use by process \d+ on .*use another --workdir"
        with pytest.raises(InUse, match=words), leased(folder, "workdir"):
            pass
        owner.check()
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"] and token_of(folder) is None
    with leased(folder, "workdir"):
        pass


def test_a_folder_that_stays_empty_goes(tmp_path):
    with pytest.raises(UserError, match="a mistake"), leased(tmp_path / "a" / "b", "workdir"):
        raise UserError("a mistake")
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        words = "is a file or a broken link; name a folder"
        with pytest.raises(UserError, match=words), leased(tmp_path / name, "workdir"):
            pass


# Owns the folder until it is killed.
OWNER = """
import pathlib, sys, time
from aoe_jax.storage.lease import leased
with leased(pathlib.Path(sys.argv[1]), "workdir"):
    print("owns", flush=True)
    time.sleep(600)
"""


def test_a_killed_owner_is_no_owner(tmp_path, monkeypatch, caplog):
    """A process of this host is known to have ended: the next one does not wait."""
    monkeypatch.setattr(lease, "STALE", 45.0)
    command = [sys.executable, "-c", OWNER, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owns\n"
        with pytest.raises(InUse, match=f"process {process.pid} on"), leased(tmp_path, "workdir"):
            pass
        process.kill()
    started = time.monotonic()
    with leased(tmp_path, "workdir") as owner:
        owner.check()
    assert time.monotonic() - started < 30


def test_an_owner_on_another_host_that_lives(tmp_path):
    elsewhere(tmp_path)
    ended = threading.Event()

    def renew():
        while not ended.wait(0.05):
            with contextlib.suppress(FileNotFoundError):  # it was taken over
                os.utime(tmp_path / NAME)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        words = "is in use by process 11 on tpu-3"
        with pytest.raises(InUse, match=words), leased(tmp_path, "workdir"):
            pass
        with leased(tmp_path, "workdir", take_over=True) as owner:
            owner.check()
    finally:
        ended.set()
        thread.join()


def test_an_owner_on_another_host_that_is_silent(tmp_path, caplog):
    elsewhere(tmp_path)
    started = time.monotonic()
    with leased(tmp_path, "workdir") as owner:
        assert time.monotonic() - started >= 1.0
        elsewhere(tmp_path, host="tpu-4", token="bb")  # a third takes over
        with pytest.raises(UserError, match="was taken over by process 11 on tpu-4"):
            owner.check()
    assert "belongs to process 11 on tpu-3; this process takes over if it does not" in caplog.text
    assert "was taken over from process 11 on tpu-3" in caplog.text
    assert token_of(tmp_path) == "bb"  # and stays


@pytest.mark.parametrize(
    "content",
    ["", "{", "\0" * 99, "filelock/2\npid=1\n", MARK.format(pid=1, host="x", token="", duration=1)],
    ids=["empty", "JSON", "NUL", "half", "without a token"],
)
def test_a_file_that_is_no_lease(tmp_path, content):
    """Nothing in it is executed, and with `take_over` its owner counts as silent."""
    (tmp_path / NAME).write_text(content)
    with leased(tmp_path, "workdir", take_over=True) as owner:
        owner.check()


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.write_bytes(bytes(5000))])
def test_a_file_that_cannot_be_one(tmp_path, make):
    make(tmp_path / NAME)
    words = r"--w=.* cannot be written: (Is a directory|it has more than 4096 bytes)"
    with pytest.raises(UserError, match=words), leased(tmp_path, "w"):
        pass


def test_a_lease_of_another_duration(tmp_path):
    elsewhere(tmp_path, duration="600.0")
    words = "remove the file if no process uses its folder"
    with pytest.raises(UserError, match=words), leased(tmp_path, "workdir"):
        pass


@pytest.mark.parametrize("host", ["", "hôst", "a\nhost=b\ntoken=c", "x" * 2000, "\udcff"])
def test_names_of_hosts(tmp_path, monkeypatch, host):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    with leased(tmp_path, "workdir") as owner:
        owner.check()
        with pytest.raises(InUse, match=r"process \d+ on [!-~]+\. It may"), leased(tmp_path, "w"):
            pass


def test_only_one_takes_over(tmp_path):
    """Six threads at once, of which a real process needs one."""
    for trial in range(3):
        folder = tmp_path / str(trial)
        elsewhere(folder)
        all_here, all_tried, owners = threading.Barrier(6), threading.Barrier(6), []

        def attempt(folder=folder, here=all_here, tried=all_tried, owners=owners):
            here.wait()
            with contextlib.ExitStack() as held:
                with contextlib.suppress(InUse):
                    owners.append(held.enter_context(leased(folder, "workdir")))
                    owners[-1].check()
                tried.wait()

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(owners) == 1
        assert not [*folder.iterdir()]


def test_a_disk_that_is_no_longer_there(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "retry_seconds", 3.0)
    folder, aside = tmp_path / "disk" / "run", tmp_path / "aside"
    with leased(folder, "workdir") as owner:
        folder.parent.rename(aside)
        threading.Timer(0.7, lambda: aside.rename(folder.parent)).start()
        owner.check()
        folder.parent.rename(aside)
        folder.mkdir(parents=True)
        monkeypatch.setattr(retry, "retry_seconds", 0.2)
        with pytest.raises(MachineFault, match=rf"{NAME} is gone; is its disk mounted\?"):
            owner.check()


def test_a_disk_that_was_away_for_longer_than_a_lease(tmp_path, monkeypatch):
    """The lease is taken again, because nobody else has taken it."""
    with leased(tmp_path, "workdir") as owner:
        lock = owner._lock
        given_up = SimpleNamespace(compromise=True, token=lock.token)
        given_up.release, given_up.acquire = (
            lock.release,
            lambda timeout: setattr(owner, "_lock", lock) or lock.acquire(timeout=timeout),
        )
        monkeypatch.setattr(owner, "_lock", given_up)
        owner.check()
        owner.check()
        assert token_of(tmp_path) == lock.token != given_up.token


# Owns the folder until another process has been refused.
RIVAL = """
import pathlib, sys, time
from aoe_jax.errors import InUse
from aoe_jax.storage import lease
from aoe_jax.storage.paths import parsed_path
folder = parsed_path(sys.argv[1], "--workdir", in_store=True)
refused = pathlib.Path(sys.argv[2])
lease.RENEW, lease.STALE = 0.1, 6.0
try:
    with lease.leased(folder, "workdir") as owner:
        deadline = time.monotonic() + 60
        while not refused.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            owner.check()
        print("trained")
except InUse:
    refused.touch()
    print("refused")
"""


def outcomes_of_rivals(folder, refused, **variables):
    """What two processes say that want a folder at the same time."""
    command = [sys.executable, "-c", RIVAL, str(folder), str(refused)]
    options = {"stdout": subprocess.PIPE, "cwd": ROOT, "text": True, "env": os.environ | variables}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    return sorted(process.communicate(timeout=120)[0].strip() for process in processes)


def test_two_processes_that_want_a_folder(tmp_path):
    """It belongs to a third host, which is silent."""
    elsewhere(tmp_path / "run", duration="6.0")
    assert outcomes_of_rivals(tmp_path / "run", tmp_path / "refused") == ["refused", "trained"]


def test_a_stopped_owner_that_goes_on_late(tmp_path):
    """It finds out before it writes."""
    command = [sys.executable, "-c", RIVAL, str(tmp_path / "run"), str(tmp_path / "refused")]
    options = {"stderr": subprocess.PIPE, "cwd": ROOT, "text": True}
    with subprocess.Popen(command, **options) as process:
        while token_of(tmp_path / "run") is None:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        lease.STALE = 6.0
        with leased(tmp_path / "run", "workdir") as owner:
            process.send_signal(signal.SIGCONT)
            assert "was taken over by process" in process.communicate(timeout=60)[1]
            owner.check()
    assert process.returncode == 1

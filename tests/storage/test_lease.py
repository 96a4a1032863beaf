"""Ownership of a folder on a disk or in an object store. The owners are processes of this host, of
other hosts, and several processes that start at the same time.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from aoe_jax.errors import InUse, MachineFault, UserError
from aoe_jax.storage import lease, retry
from aoe_jax.storage.files import write_json
from aoe_jax.storage.lease import NAME, leased, owner_of
from aoe_jax.storage.paths import is_remote, new_folder
from tests.runs import ROOT, wait_for

MARK = "filelock/2\npid=11\nhost={host}\nmode=lease\ntoken={token}\nduration={duration}\n"
TIMES = lease.RENEW, lease.STALE
everywhere = pytest.mark.parametrize("folder", ["disk", "gs"], indirect=True)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "STALE", 30.0)
    monkeypatch.setattr(lease, "_SETTLE", 0.2)


def elsewhere(folder, host="tpu-3", token="aa", duration=None):
    """Writes the lease file of an owner on another host."""
    if not is_remote(folder):
        folder.mkdir(exist_ok=True)
        (folder / NAME).unlink(missing_ok=True)
    content = MARK.format(host=host, token=token, duration=duration or lease.STALE)
    (folder / NAME).write_text(content)


@pytest.mark.parametrize("folder", ["disk", "gs", "s3"], indirect=True)
def test_one_owner_of_a_folder(folder, monkeypatch):
    with leased(folder, "workdir") as owner:
        (folder / "file").write_text("")  # an empty folder is removed at the end
        owner.check()
        assert owner_of(folder)["token"] == owner.token
        words = rf"--workdir=.* is in use by process {os.getpid()} on .*use another --workdir"
        started = time.monotonic()
        with pytest.raises(InUse, match=words), leased(folder, "workdir"):
            pass
        assert time.monotonic() - started < lease.STALE / 2  # the owner renews it every RENEW
        owner.check()
        held = (folder / NAME).read_bytes()
        with monkeypatch.context() as patch:  # another process fails to take over
            patch.setattr(time, "sleep", lambda _: (folder / NAME).write_bytes(held))
            elsewhere(folder)
            owner.check()
        if is_remote(folder):  # it must not renew the lease after the other process has read it
            owner._ended.set()
            owner._renewer.join()
        (folder / NAME).unlink()
        with leased(folder, "workdir") as other:
            other.check()
            with pytest.raises(UserError, match="was taken over by process"):
                owner.check()
    assert [path.name for path in folder.iterdir()] == ["file"] and not owner_of(folder)
    with leased(folder, "workdir"):
        pass


def test_times():
    """docs/training.md names them. Versions that use the same folder need the same times."""
    assert TIMES == (5, 45)


@everywhere
def test_an_owner_on_another_host_that_lives(folder):
    elsewhere(folder)
    ended = threading.Event()

    def renew():
        while not ended.wait(0.05):
            with contextlib.suppress(FileNotFoundError):
                if is_remote(folder):
                    elsewhere(folder, token=f"{time.monotonic_ns()}")
                else:
                    os.utime(folder / NAME)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        words = "is in use by process 11 on tpu-3"
        with pytest.raises(InUse, match=words), leased(folder, "workdir"):
            pass
    finally:
        ended.set()
        thread.join()


@everywhere
def test_an_owner_on_another_host_that_is_silent(folder, caplog, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 1.0)
    elsewhere(folder)
    if is_remote(folder):  # of two that take over at the same time, the last to write is the owner
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: elsewhere(folder))
            assert not lease._InStore(folder).take(lease.STALE)
    started = time.monotonic()
    with leased(folder, "workdir") as owner:
        assert time.monotonic() - started >= 1.0
        if is_remote(folder):
            owner._ended.set()
        elsewhere(folder, host="tpu-4", token="bb")  # a third process takes over
        with pytest.raises(UserError, match="was taken over by process 11 on tpu-4"):
            owner.check()
    assert "belongs to process 11 on tpu-3; waiting 1 s" in caplog.text
    assert "was taken over from process 11 on tpu-3" in caplog.text
    assert owner_of(folder)["token"] == "bb"  # and stays


@pytest.mark.parametrize("content", ["", "{", "\0" * 99])
def test_a_file_that_is_no_lease(tmp_path, content, monkeypatch):
    """Nothing in the file is executed, and its owner is treated as dead."""
    monkeypatch.setattr(lease, "STALE", 0.3)
    (tmp_path / NAME).write_text(content)
    with leased(tmp_path, "workdir") as owner:
        owner.check()


@pytest.mark.parametrize("name", ["", "r\u00fcbe", "a b", "a/b", "a\nhost=b", "\udcff", "h" * 300])
@everywhere
def test_names_of_hosts(folder, name, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: name)
    with leased(folder, "workdir") as owner:
        owner.check()
        words = f"is in use by process {os.getpid()} on "
        with pytest.raises(InUse, match=words), leased(folder, "workdir"):
            pass
        if not is_remote(folder):
            write_json(folder / "file.json", {})
            with new_folder(folder / "store") as new:
                (new / "shard").touch()
            assert {path.name for path in folder.iterdir()} == {NAME, "file.json", "store"}


def test_a_copy_of_a_folder_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 1.0)
    with leased(tmp_path / "run", "workdir"):
        copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with leased(copy, "workdir") as owner:
            owner.check()


def test_a_path_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "link"):
        words = "is a file or a broken link; name a folder"
        with pytest.raises(UserError, match=words), leased(tmp_path / name, "workdir"):
            pass


def test_a_disk_that_is_no_longer_there(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "retry_seconds", 3.0)
    folder, aside = tmp_path / "disk" / "run", tmp_path / "aside"
    with leased(folder, "workdir") as owner:
        folder.parent.rename(aside)
        with monkeypatch.context() as patch:
            brings_back = SimpleNamespace(
                monotonic=time.monotonic, sleep=lambda seconds: aside.rename(folder.parent)
            )
            patch.setattr(retry, "time", brings_back)
            owner.check()
        folder.parent.rename(aside)
        folder.mkdir(parents=True)
        monkeypatch.setattr(retry, "retry_seconds", 0.2)
        with pytest.raises(MachineFault, match=rf"{NAME} is gone; is its disk mounted\?"):
            owner.check()


# This program owns the folder until another process has been refused.
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


def rival(folder, refused):
    command = [sys.executable, "-c", RIVAL, str(folder), str(refused)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


@everywhere
def test_two_processes_that_want_a_folder(folder, tmp_path):
    """The folder's owner is a third host, which no longer renews its lease."""
    elsewhere(folder, duration=6.0)
    processes = [rival(folder, tmp_path / "refused") for _ in range(2)]
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(outcomes) == ["refused", "trained"]


def test_an_owner_on_this_host_that_is_killed(tmp_path, caplog, monkeypatch):
    """The next owner does not wait."""
    monkeypatch.setattr(lease, "STALE", 6.0)  # that of the rival
    folder = tmp_path / "run"
    with rival(folder, tmp_path / "refused") as process:
        wait_for(process, lambda: (owner_of(folder) or {}).get("token"))
        process.kill()
        process.wait()
        with leased(folder, "workdir") as owner:
            owner.check()
    assert "; waiting" not in caplog.text

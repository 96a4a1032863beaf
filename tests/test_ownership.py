"""Owners of a folder: processes of this kernel, of other hosts, and several that come at once."""

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import lease, retry
from aoe_jax.storage.lease import RENEWED, owned, read_owner
from tests.runs import ROOT


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.5)


def elsewhere(folder, number=1, **fields):
    """Makes the file of an owner on another host."""
    owner = {"nonce": 7, "host": "tpu-3", "pid": 11, "started": 1, "kernel": "other", "time": 0}
    folder.mkdir(exist_ok=True)
    (folder / f"owner_{number}.json").write_text(json.dumps(owner | fields))


def test_one_owner_of_a_folder(tmp_path):
    folder = tmp_path / "run"
    with owned(folder, "workdir") as owner:
        owner.check()
        with (
            pytest.raises(UserError, match=r"--workdir=.*/run is in use by process \d+ on .*, whi"),
            owned(folder, "workdir", take_over=False),
        ):
            pass
        owner.check()
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    with owned(folder, "workdir"):
        pass


def test_a_folder_that_stays_empty_goes(tmp_path):
    with pytest.raises(UserError, match="a mistake"), owned(tmp_path / "a" / "b", "workdir"):
        raise UserError("a mistake")
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="is a file or a broken link; name"),
        owned(tmp_path / "file", "o"),
    ):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(UserError, match="is a file or a broken link; name"),
        owned(tmp_path / "link", "o"),
    ):
        pass


def test_an_owner_that_has_ended_is_no_owner(tmp_path, monkeypatch, caplog):
    code = (
        "import os, pathlib\nfrom aoe_jax.storage.lease import owned\n"
        f"with owned(pathlib.Path({str(tmp_path)!r}), 'x'): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert read_owner(tmp_path)
    caplog.set_level("INFO")
    monkeypatch.setattr(lease, "STALE", 60.0)
    started = time.monotonic()
    with owned(tmp_path, "workdir"):
        assert time.monotonic() - started < 30  # without waiting
    assert "was taken over from process" in caplog.text


def test_a_process_that_the_system_hides_may_live(tmp_path, monkeypatch):
    """As with hidepid, where /proc has no folders of other users' processes."""
    with owned(tmp_path, "workdir"):
        here = read_owner(tmp_path)
    assert lease._has_ended(here) is False

    def hide(path):
        raise FileNotFoundError(path)

    there = lease._kernel()
    monkeypatch.setattr(lease, "_kernel", lambda: there)
    monkeypatch.setattr(lease.Path, "read_text", hide)
    assert lease._has_ended(here) is None
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, 2**62):
        assert lease._has_ended(here | {"pid": pid}) is True
    assert lease._has_ended(here | {"started": None}) is None


def test_an_owner_on_another_host_that_lives(tmp_path):
    elsewhere(tmp_path)
    ended = threading.Event()

    def renew():
        count = 0
        while not ended.wait(0.05):
            count += 1
            (tmp_path / RENEWED).write_text(json.dumps({"nonce": 7, "count": count}))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="is in use by process 11 on tpu-3"),
            owned(tmp_path, "workdir"),
        ):
            pass
        with owned(tmp_path, "workdir", take_over=True) as owner:
            owner.check()
    finally:
        ended.set()
        thread.join()


def test_an_owner_on_another_host_that_is_silent(tmp_path, caplog):
    elsewhere(tmp_path)
    caplog.set_level("INFO")
    started = time.monotonic()
    with owned(tmp_path, "workdir") as owner:
        assert time.monotonic() - started >= 0.5
        elsewhere(tmp_path, number=3, nonce=9)  # a third takes over
        with pytest.raises(UserError, match="was taken over by process 11 on tpu-3"):
            owner.check()
    assert "belongs to process 11 on tpu-3" in caplog.text
    assert read_owner(tmp_path)["nonce"] == 9  # and stays


def test_a_disk_that_is_away_for_owner_and_others(tmp_path, monkeypatch):
    """The time in which neither can reach it does not count: the owner has not been silent."""
    elsewhere(tmp_path)
    read, away = lease.read_regular, threading.Event()
    monkeypatch.setattr(lease, "RENEW", 0.6)
    monkeypatch.setattr(lease, "STALE", 1.5)

    def read_if_there(*arguments):
        if away.is_set():
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    def renew():
        time.sleep(1)
        away.set()
        time.sleep(3)
        away.clear()
        time.sleep(0.4)
        (tmp_path / RENEWED).write_text(json.dumps({"nonce": 7, "count": 2}))

    monkeypatch.setattr(lease, "read_regular", read_if_there)
    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match="is in use by"), owned(tmp_path, "workdir"):
        pass
    thread.join()


def test_a_slow_disk_does_not_delay_a_takeover_for_ever(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    read = lease.read_regular

    def slowly(*arguments):
        time.sleep(0.04)
        return read(*arguments)

    monkeypatch.setattr(lease, "read_regular", slowly)
    started = time.monotonic()
    with owned(tmp_path, "workdir") as owner:
        owner.check()
    assert time.monotonic() - started < 30


def test_a_disk_that_is_mounted_after_the_start(tmp_path):
    """The run on it has an owner, too, but nobody took this folder over."""
    folder, on_disk = tmp_path / "run", tmp_path / "disk"
    elsewhere(on_disk)
    with owned(folder, "workdir") as owner:
        folder.rename(tmp_path / "below")
        on_disk.rename(folder)
        with pytest.raises(MachineFault, match="is not the folder that it was at the start: its"):
            owner.check()
    assert read_owner(folder)["host"] == "tpu-3"  # and stays


@pytest.mark.parametrize(
    "content", ['{"nonce": 1', "", "\0", "[" * 4000, "[1]", "9" * 4000], ids=lambda text: text[:9]
)
def test_half_an_owner_file(tmp_path, content):
    (tmp_path / "owner_1.json").write_text(content)
    with owned(tmp_path, "workdir", take_over=True) as owner:
        owner.check()


@pytest.mark.parametrize(
    "fields",
    [
        {"time": "today"},
        {"time": 1e300},
        {"time": float("nan")},
        {"kernel": lease._kernel(), "pid": "\0"},
        {"host": "tpu-3\x1b[2J"},
        {"started": []},
    ],
    ids=str,
)
def test_an_owner_file_of_somebody_else(tmp_path, fields, caplog):
    """Nothing in it is used, and its owner counts as silent."""
    elsewhere(tmp_path, **fields)
    with owned(tmp_path, "workdir") as owner:
        owner.check()
    assert "belongs to an unknown process; if it does not renew" in caplog.text


@pytest.mark.parametrize("name", ["owner_1.json", RENEWED])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.write_bytes(bytes(5000))])
def test_owner_files_that_are_no_small_files(tmp_path, name, make):
    elsewhere(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with (
        pytest.raises(UserError, match=f"{name} cannot be read .*; remove it"),
        owned(tmp_path, "w"),
    ):
        pass


def test_an_owner_file_that_is_listed_but_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    monkeypatch.setattr(lease, "_LATE_LOOKS", 2)
    (tmp_path / "owner_1.json").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(MachineFault, match=r"owner_1.json is listed, but it is gone"),
        owned(tmp_path, "w"),
    ):
        pass


def test_only_one_takes_over(tmp_path):
    """Eight threads at once, of which a real process needs one."""
    for trial in range(20):
        folder = tmp_path / str(trial)
        elsewhere(folder)
        all_here, all_tried, owners = threading.Barrier(8), threading.Barrier(8), []

        def attempt(folder=folder, here=all_here, tried=all_tried, owners=owners):
            here.wait()
            with contextlib.ExitStack() as held:
                with contextlib.suppress(UserError):
                    owners.append(held.enter_context(owned(folder, "workdir", take_over=True)))
                    owners[-1].check()
                tried.wait()

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(owners) == 1
        assert not [*folder.iterdir()]


def test_a_process_that_stops_between_its_look_and_its_claim(tmp_path, monkeypatch):
    """It has seen a silent owner; meanwhile another has taken over, and a third has begun anew."""
    make, paused, goes_on = lease.create, threading.Event(), threading.Event()

    def create_late(path, content):
        if threading.current_thread() is late:
            paused.set()
            goes_on.wait()
        return make(path, content)

    def claim():
        with pytest.raises(UserError, match="is in use by"), owned(tmp_path, "w", take_over=True):
            pass

    monkeypatch.setattr(lease, "create", create_late)
    late = threading.Thread(target=claim)
    elsewhere(tmp_path)
    late.start()
    paused.wait()
    with owned(tmp_path, "w", take_over=True) as owner:
        owner.check()
    with owned(tmp_path, "w") as owner:
        goes_on.set()
        late.join()
        owner.check()
        assert [path.name for path in tmp_path.glob("owner_[0-9]*")] == ["owner_1.json"]
    assert not [*tmp_path.iterdir()]


def test_an_owner_that_wakes_late_leaves_the_files_of_others(tmp_path):
    elsewhere(tmp_path, nonce=7)
    silent = lease.Owner(tmp_path, None, tmp_path / "owner_1.json", 7)
    with owned(tmp_path, "w", take_over=True):
        pass
    with owned(tmp_path, "w") as third:  # in a folder without an owner
        silent.release()
        third.check()
        assert third.is_in_place() and not silent.is_in_place()


def test_a_disk_that_is_no_longer_there(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "retry_seconds", 3.0)
    folder, aside = tmp_path / "disk" / "run", tmp_path / "aside"
    with owned(folder, "workdir") as owner:
        folder.parent.rename(aside)
        threading.Timer(1, lambda: aside.rename(folder.parent)).start()
        owner.check()
        folder.parent.rename(aside)
        folder.mkdir(parents=True)
        with pytest.raises(MachineFault, match=r"owner_1.json is gone; is its disk mounted\?"):
            owner.check()


# Owns the folder for a while, as a process on a host of its own sees it.
ON_A_HOST = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
from aoe_jax.storage import lease
from aoe_jax.errors import UserError
lease.RENEW, lease.STALE = 0.1, 2.0
time.sleep(float(sys.argv[2]))
try:
    with lease.owned(folder, "workdir") as owner:
        deadline = time.monotonic() + 30
        while not (folder / "refused").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
            owner.check()
        print("trained")
except UserError as e:
    (folder / "refused").touch()
    print("refused" if "is in use by" in str(e) else e)
"""


def on_a_host(name, disk, mount, command):
    """The command line of a program on a host of this name, where `disk` is mounted as `mount`."""
    mount.mkdir(exist_ok=True)
    inside = f'hostname {name}; mount --bind {disk} {mount}; exec "$@"'
    unshare = ["unshare", "--pid", "--fork", "--uts", "--mount", "--mount-proc"]
    return [*unshare, "sh", "-c", inside, "sh", *map(str, command)]


@pytest.mark.parametrize("seed", range(6))
def test_two_hosts_that_share_a_folder(tmp_path, seed):
    """Two kernels, as far as processes can see, with two mounts of one folder; in every second try
    it belongs to a third host, which is silent.
    """
    choice, processes = random.Random(seed), []
    (tmp_path / "disk").mkdir()
    if seed % 2:
        elsewhere(tmp_path / "disk" / "run")
    for host in "ab":
        mount = tmp_path / host
        command = [sys.executable, "-c", ON_A_HOST, mount / "run", choice.random() / 2]
        processes.append(
            subprocess.Popen(
                on_a_host(host, tmp_path / "disk", mount, command),
                stdout=subprocess.PIPE,
                cwd=ROOT,
                text=True,
            )
        )
    assert sorted(process.communicate()[0].strip() for process in processes) == [
        "refused",
        "trained",
    ]

"""Owners of a folder: processes of this kernel, of other hosts, and several that come at once."""

import contextlib
import json
import random
import subprocess
import sys
import threading
import time

import pytest

from aoe_jax import ownership
from aoe_jax.errors import UserError
from aoe_jax.ownership import OWN_FILES, OWNER, RENEWED, owned
from tests.runs import ROOT


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(ownership, "RENEW", 0.05)
    monkeypatch.setattr(ownership, "STALE", 0.5)


def elsewhere(folder, **fields):
    """Makes `owner.json` of a process on another host."""
    owner = {"nonce": 7, "host": "tpu-3", "pid": 11, "started": 1, "kernel": "other", "time": 0}
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps(owner | fields))


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
    with pytest.raises(UserError, match="is a file; name a folder"), owned(tmp_path / "file", "o"):
        pass


def test_an_owner_that_has_ended_is_no_owner(tmp_path, caplog):
    code = (
        "import os, pathlib\nfrom aoe_jax.ownership import owned\n"
        f"with owned(pathlib.Path({str(tmp_path)!r}), 'x'): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert (tmp_path / OWNER).exists()
    caplog.set_level("INFO")
    started = time.monotonic()
    with owned(tmp_path, "workdir"):
        assert time.monotonic() - started < 0.4  # without waiting
    assert "was taken over from process" in caplog.text


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
        elsewhere(tmp_path, nonce=9)  # it comes back, or a third takes over
        with pytest.raises(UserError, match="was taken over by process 11 on tpu-3"):
            owner.check()
    assert "belongs to process 11 on tpu-3" in caplog.text
    assert json.loads((tmp_path / OWNER).read_text())["nonce"] == 9  # and stays


def test_half_an_owner_file(tmp_path):
    (tmp_path / OWNER).write_text('{"nonce": 1')
    with owned(tmp_path, "workdir", take_over=True) as owner:
        owner.check()


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
        assert not [path for path in folder.iterdir() if path.name in OWN_FILES]


# Owns the folder for a while, as a process on a host of its own sees it.
ON_A_HOST = """
import pathlib, sys, time
from aoe_jax import ownership
from aoe_jax.errors import UserError
ownership.RENEW, ownership.STALE = 0.1, 2.0
time.sleep(float(sys.argv[2]))
try:
    with ownership.owned(pathlib.Path(sys.argv[1]), "workdir") as owner:
        for _ in range(15):
            time.sleep(0.1)
            owner.check()
        print("trained")
except UserError as e:
    print("refused" if "is in use by" in str(e) else e)
"""


@pytest.mark.parametrize("seed", range(5))
def test_two_hosts_that_share_a_folder(tmp_path, seed):
    """Two kernels, as far as processes can see, with two mounts of one folder."""
    choice, processes = random.Random(seed), []
    (tmp_path / "disk").mkdir()
    for host in "ab":
        mount = tmp_path / host
        mount.mkdir()
        inside = f'hostname {host}; mount --bind {tmp_path / "disk"} {mount}; exec "$@"'
        command = [sys.executable, "-c", ON_A_HOST, str(mount / "run"), str(choice.random() / 2)]
        unshare = ["unshare", "--pid", "--fork", "--uts", "--mount", "--mount-proc"]
        processes.append(
            subprocess.Popen(
                [*unshare, "sh", "-c", inside, "sh", *command],
                stdout=subprocess.PIPE,
                cwd=ROOT,
                text=True,
            )
        )
    assert sorted(process.communicate()[0].strip() for process in processes) == [
        "refused",
        "trained",
    ]

"""Runs and models in an object store: a server on this machine."""

import json
import signal
import time

import fsspec
import pytest

from aoe_jax import faults, ownership
from aoe_jax.errors import UserError
from aoe_jax.ownership import is_own_file, owned, read_owner
from aoe_jax.paths import Mirror, create, local_copy, move, parsed_path
from tests.object_store import object_store
from tests.runs import EVERY, STEPS, finish, finished_run, same_end, start, train_command
from tests.test_faults import last_line


@pytest.fixture(scope="module")
def store():
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.variables.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def folder(store, request):
    """A folder in the store for each test."""
    fsspec.filesystem("gs").clear_instance_cache()
    return parsed_path(f"gs://bucket/{request.node.name}", "--workdir", in_store=True)


def run(store, *command):
    return finish(start([*map(str, command)], forked=False, **store.variables))


def names(store, folder):
    prefix = str(folder).removeprefix("gs://bucket/").rstrip("/") + "/"
    return {name.removeprefix(prefix) for name in store.objects if name.startswith(prefix)}


def fetched(folder, target):
    fsspec.filesystem("gs").get(f"{folder}/", f"{target}/", recursive=True)
    return target


def test_what_is_a_path():
    for text, words in (
        ("s3://b/x", r"--workdir=s3://b/x: name a folder, or gs://BUCKET/\.\.\."),
        ("gs:/b/x", "name a folder, or gs://"),
    ):
        with pytest.raises(UserError, match=words):
            parsed_path(text, "--workdir", in_store=True)
    with pytest.raises(UserError, match="--output=gs://b/x: it must be on a disk; name a folder"):
        parsed_path("gs://b/x", "--output")
    assert "~" not in str(parsed_path("~/runs", "--workdir"))


def test_files(folder, tmp_path, store):
    assert create(folder / "a", b"1") and not create(folder / "a", b"2")
    move(folder / "a", folder / "deep" / "b")
    (tmp_path / "old").write_text("old")
    mirror = Mirror(tmp_path, folder)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "new").write_text("new")
    mirror.upload()
    assert names(store, folder) == {"deep/b", "sub/new"}
    copy = local_copy(folder, tmp_path / "cache")
    assert (copy / "sub" / "new").read_text() == "new" and local_copy(copy) == copy
    assert local_copy(folder, tmp_path / "cache") == copy
    (folder / "eval.json").write_text("{}")
    assert local_copy(folder, tmp_path / "cache") == copy
    (folder / "deep" / "b").write_text("changed")
    assert local_copy(folder, tmp_path / "cache") != copy


def test_one_owner(folder, monkeypatch):
    monkeypatch.setattr(ownership, "STALE", 1.0)
    with owned(folder, "workdir") as owner:
        owner.check()
        with pytest.raises(UserError, match="is in use by"), owned(folder, "workdir"):
            pass
    assert read_owner(folder) is None
    elsewhere = {"nonce": 7, "host": "tpu-3", "pid": 11, "started": 1, "kernel": "other", "time": 0}
    (folder / "owner_1.json").write_text(json.dumps(elsewhere))
    with owned(folder, "workdir") as owner:
        owner.check()


def test_a_store_that_fails_for_a_while(folder, store, monkeypatch):
    monkeypatch.setattr(faults, "retry_seconds", 30)
    store.fails_until = time.monotonic() + 3
    assert faults.patiently("the file cannot be made", lambda: create(folder / "a", b"1"))
    assert store.failed


def test_a_run_that_is_killed_and_goes_on(folder, store, tmp_path):
    """Also while the store answers 503; then the model is evaluated, exported and read."""
    command = train_command(folder)
    process = start(command, forked=False, **store.variables)
    prefix = f"{folder}".removeprefix("gs://bucket/")
    saved = f"{prefix}/checkpoints/{2 * EVERY}/_CHECKPOINT_METADATA"
    deadline = time.monotonic() + 240
    while saved not in store.objects and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    failed = store.failed
    process = start(command, forked=False, **store.variables)
    saved = saved.replace(f"/{2 * EVERY}/", f"/{4 * EVERY}/")
    while saved not in store.objects and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    store.fails_until = time.monotonic() + 3
    status, _, stderr = finish(process)
    assert store.failed > failed  # the clients of the store have tried again
    assert status == 0 and "going on from step" in stderr, stderr
    assert same_end(fetched(folder, tmp_path / "run"), finished_run())
    assert not [name for name in names(store, folder) if is_own_file(name)]

    status, _, stderr = run(store, "eval.py", f"--workdir={folder}", "--split=validation")
    assert status == 0, stderr
    model = folder.parent / "model"
    status, _, stderr = run(
        store, "-m", "aoe_jax.export", f"--workdir={folder}", f"--output={model}"
    )
    assert status == 0, stderr
    status, _, stderr = run(store, "eval.py", f"--workdir={model}", "--split=validation")
    assert status == 0, stderr
    reports = [json.loads((path / "eval.json").read_text()) for path in (folder, model)]
    assert reports[0] == reports[1] and reports[0]["step"] == STEPS
    status, _, stderr = run(
        store, "-m", "aoe_jax.export", f"--workdir={folder}", f"--output={model}"
    )
    assert status == 2 and f"--output={model} exists already" in last_line(stderr)

import errno
import json
import os

import pytest

from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import (
    COUNT,
    TEXT,
    or_none,
    read_json,
    read_metrics,
    read_text,
    sync,
    write_json,
    write_report,
)
from aoe_jax.storage.paths import host_name, new_folder


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    """The content, and then the name in its folder, are on the disk when the call returns."""
    path, synced = tmp_path / "value.json", []
    monkeypatch.setattr("aoe_jax.storage.files.sync", synced.append)
    write_json(path, {"a": 1})
    assert synced[0].suffix == ".partial" and synced[1:] == [tmp_path]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == json.loads(path.read_text()) == {"a": 1}

    def fail(descriptor):
        raise OSError(code, "no fsync")

    monkeypatch.setattr(os, "fsync", fail)
    code = errno.EINVAL  # some network disks do not support it for folders
    sync(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match="no fsync"):
        sync(tmp_path)


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    words = r"--workdir=.*/gone cannot be written \(it is gone; is its disk mounted\?\); it was"
    with pytest.raises(MachineFault, match=words):
        write_report(tmp_path / "gone" / "eval.json", {}, "workdir")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "holds no JSON object"),
        (None, "No such file"),
        ('{"a":' * 99999, "nested too deeply"),
        (" " * 2**24 + "{}", "it has more than 16777216 bytes"),
    ],
)
def test_mistakes(tmp_path, content, message):
    path = tmp_path / "value.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"value\.json cannot be read.*{message}.*; name another"):
        read_json(path, "name another")


def test_an_error_without_a_number(tmp_path, monkeypatch):
    """Clients of object stores raise OSErrors without an errno."""

    def fail(path, at_most):
        raise FileNotFoundError("bucket/value.json")

    monkeypatch.setattr("aoe_jax.storage.files.read_bytes", fail)
    for read in (read_json, lambda path: read_text(path, str(path), 9)):
        with pytest.raises(UserError, match=r"cannot be read \(bucket/value\.json\); name"):
            read(tmp_path / "value.json")


SCHEMA = {"name": TEXT, "step": or_none(COUNT), "parts": [{"size": COUNT}], "files": {str: TEXT}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name is None, not a text"),
        ({"step": True}, "step is True, not a whole number from 0 to 2**63 or null"),
        ({"step": -1}, "step is -1, not"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [{"size": 1}, {"size": 2.5}]}, "parts[1].size is 2.5, not a whole number"),
        ({"parts": [{}]}, "parts[0].size is None, not"),
        ({"files": {"x": 1}}, "files['x'] is 1, not a text"),
        ({"files": []}, "files is [], not an object"),
    ],
)
def test_schema(tmp_path, changes, message):
    path, value = tmp_path / "value.json", {"name": "x", "parts": [], "files": {}, "more": 1}
    write_json(path, value)
    assert read_json(path, schema=SCHEMA) == value
    write_json(path, value | changes)
    with pytest.raises(UserError) as error:
        read_json(path, "name another", SCHEMA)
    assert f"value.json cannot be read: {message}" in str(error.value)


def test_metrics_that_are_no_metrics_are_left_out(tmp_path):
    lines = [b'{"step": 1, "nll": 2}', b"{", b"[1]", b'{"step": true}', b'{"step": 1e9}', b"\xff"]
    lines += [b'{"step": 2, "nll": "x"}', b"[" * 99999, b'{"step": 3, "layers": {"a": [1]}}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'{"step": 4, "n')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_whole(tmp_path, monkeypatch):
    """The first host that finishes makes the folder. Files of killed processes are removed."""
    left = tmp_path / f"store.partial-{host_name()}"
    left.mkdir()
    (left / "shard").touch()
    with new_folder(tmp_path / "store") as ours:
        assert names(ours) == []
        (ours / "ours").touch()
        with monkeypatch.context() as there:
            there.setattr("socket.gethostname", lambda: "other")
            with new_folder(tmp_path / "store") as theirs:
                (theirs / "theirs").touch()
    assert names(tmp_path) == ["store"] and names(tmp_path / "store") == ["theirs"]
    with pytest.raises(ValueError, match="a mistake"), new_folder(tmp_path / "deep" / "store"):
        raise ValueError("a mistake")
    assert names(tmp_path / "deep") == []

"""Exceptions that are faults of a machine, and exceptions that show damage or a mistake."""

import errno
import os
import re
from types import SimpleNamespace

import google.auth.exceptions
import pyarrow
import pytest
import requests
from aiohttp import ServerDisconnectedError
from gcsfs.retry import HttpError
from huggingface_hub.errors import OfflineModeIsEnabled
from jax.errors import JaxRuntimeError

from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.retry import Tolerated, is_fault, patiently, reason


def caused_by(cause):
    """Returns an exception of a library that was raised from `cause`."""
    try:
        raise ValueError("cannot read") from cause
    except ValueError as e:
        return e


def answer(status):
    """Returns the exception that `requests` raises for an answer with this status."""
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"answer {status}", response=response)


FAULTS = [
    *(OSError(code, os.strerror(code)) for code in (errno.EIO, errno.EFBIG, errno.EDQUOT)),
    *(OSError(code, os.strerror(code)) for code in (errno.ESTALE, errno.ENOTCONN, errno.EROFS)),
    ConnectionResetError(),
    TimeoutError(),
    MemoryError(),
    HttpError({"code": 503, "message": "try later"}),
    HttpError({"code": 429, "message": "too many"}),
    *(HttpError({"code": code, "message": "no"}) for code in (401, 403)),
    OSError("Forbidden: https://storage.googleapis.com/b/x\nno"),  # of gcsfs, without an errno
    requests.exceptions.ProxyError(),  # of gcsfs, for status 502
    requests.exceptions.ReadTimeout(),
    google.auth.exceptions.RefreshError("no token"),
    ServerDisconnectedError(),
    *map(answer, (408, 429, 503)),
    requests.ConnectionError("the name is not known"),
    requests.exceptions.ChunkedEncodingError("IncompleteRead(5 bytes read, 7 more expected)"),
    RuntimeError("Failed to get url http://x. HTTP code: 502."),  # of TFDS
    ValueError("RESOURCE_EXHAUSTED: quota exceeded"),  # of a store
    ValueError("Error reading local file: Input/output error"),
    pyarrow.ArrowIOError("Error reading bytes from file. Detail: [errno 5] Input/output error"),
]
FILLED = [
    JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
    JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
]
OTHERS = [
    *FILLED,
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    OSError("Truncated compressed stream"),  # of pyarrow, without an errno
    OSError("zlib inflate failed: incorrect data check"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    HttpError({"code": 400, "message": "no"}),
    requests.exceptions.InvalidURL("no host"),
    answer(404),
    OfflineModeIsEnabled("HF_HUB_OFFLINE=1"),  # a ConnectionError
    ValueError("Error decoding zarr metadata"),
    KeyError("arrays"),
]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_faults(error):
    assert is_fault(error) and is_fault(caused_by(error))


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_no_faults(error):
    assert not is_fault(error) and not is_fault(caused_by(error))


@pytest.mark.parametrize("error", FILLED, ids=repr)
def test_the_status_of_a_full_device(error):
    assert retry.status_of(error) == retry.status_of(caused_by(error)) == UserError.status


def test_reason_is_that_of_the_first_cause():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert reason(caused_by(full)) == "No space left on device"


def test_patience(monkeypatch, caplog):
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "retry_seconds", 0.2)
    answers = [OSError(errno.EIO, "Input/output error")] * 3 + [7]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("a file cannot be read", call) == 7
    assert caplog.text.count("a file cannot be read (Input/output error); next try in") == 3
    answers[:] = [OSError(errno.EIO, "Input/output error")] * 99
    caplog.clear()
    with pytest.raises(MachineFault, match=r"it was tried for 0\.2 s"):
        patiently("a file cannot be read", call)
    assert sum(map(float, re.findall(r"next try in (\S+) s", caplog.text))) <= 0.2
    answers[:] = [FileNotFoundError()] * 2
    with pytest.raises(FileNotFoundError):
        patiently("a file cannot be read", call)
    answers[:] = [PermissionError(errno.EACCES, "Permission denied", "/a/file")] * 2
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied: /a/file\)"):
        patiently("a file cannot be read", call)
    assert len(answers) == 1

    now, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.undo()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(retry, "retry_seconds", 100)
    answers[:] = [OSError(errno.EIO, "Input/output error")] * 99
    with pytest.raises(MachineFault):
        patiently("a file cannot be read", call)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 8.5]


def test_tolerated(caplog):
    tolerated = Tolerated("heartbeat.json")
    for fails in (False, True, True, False, True):
        with tolerated:
            if fails:
                raise OSError(errno.EROFS, "Read-only file system")
    assert caplog.text.count("cannot be written (Read-only file system); the run goes on") == 2
    with pytest.raises(KeyboardInterrupt), tolerated:
        raise KeyboardInterrupt

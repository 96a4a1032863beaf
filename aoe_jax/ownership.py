"""One process owns a folder, on any file system: locks of the system hold on one host only.

The owner makes `owner.json` exclusively and rewrites `owner_renewed.json` every `RENEW` seconds,
whatever else it does. Another process may take a folder over

- at once, if the owner was a process of the same kernel that has ended;
- if the second file does not change for `STALE` seconds, by the clock of the process that waits;
- without this wait, with `take_over`.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import UserError
from aoe_jax.faults import is_fault, is_forbidden, patiently
from aoe_jax.json_files import write_json
from aoe_jax.paths import create, is_remote

log = logging.getLogger(__name__)

RENEW, STALE = 10.0, 60.0  # seconds
OWN_FILES = OWNER, RENEWED, TAKING = (
    "owner.json",
    "owner_renewed.json",
    "owner_taken_over.json",
)


class Owner:
    """The ownership of a folder by this process, from `owned`."""

    def __init__(self, folder: Path, nonce: int):
        """Begins to renew the ownership, which `nonce` identifies."""
        self.nonce = nonce
        self._folder, self._ended = folder, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="renews ownership")
        self._thread.start()

    def check(self):
        """Raises `UserError` if another process has taken the folder over."""
        found = patiently(f"{self._folder / OWNER} cannot be read", self._read)
        if found.get("nonce") != self.nonce:
            raise UserError(f"{self._folder} was taken over by {_in_words(found)}")

    def _read(self):
        return read_owner(self._folder) or {}

    def _renew(self):
        count = 0
        while not self._ended.wait(RENEW):
            with contextlib.suppress(Exception):  # the next try may succeed
                if self._read().get("nonce") not in (None, self.nonce):
                    return
                count += 1
                write_json(self._folder / RENEWED, {"nonce": self.nonce, "count": count})

    def release(self):
        """Removes the files, if they are still those of this process."""
        self._ended.set()
        self._thread.join(timeout=5)  # a disk that hangs must not hold up the end
        with contextlib.suppress(Exception):
            if self._read().get("nonce") == self.nonce:
                (self._folder / RENEWED).unlink(missing_ok=True)
                (self._folder / OWNER).unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder: Path, flag: str, take_over=False) -> Iterator[Owner]:
    """Owns a folder, which is made if there is none; one that stays empty is removed at the end.

    Raises:
      UserError: the folder cannot be made, or another process owns it. It names the `flag` that
        gave the folder.
    """
    is_new = not is_remote(folder) and not folder.exists()
    make_folder(folder, flag)
    owner = Owner(folder, _acquire(folder, flag, take_over))
    try:
        yield owner
    finally:
        owner.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_folder(folder: Path, flag: str):
    """Makes a folder if there is none.

    Raises:
      UserError: it can't be made; names the `flag` that gave it.
      MachineFault: its disk fails.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--{flag}={folder} is a file; name a folder")
    _write_or_refuse(folder, flag, lambda: folder.mkdir(parents=True, exist_ok=True))


def _write_or_refuse(folder, flag, write):
    """Returns `write()`; what only the user can change is refused at once."""

    def attempt():
        try:
            return write()
        except OSError as e:
            if is_fault(e) and not is_forbidden(e):
                raise
            raise UserError(f"--{flag}={folder} can't be written: {e.strerror}") from e

    return patiently(f"--{flag}={folder} cannot be written", attempt)


def read_owner(folder: Path) -> dict | None:
    """The content of `owner.json`; empty if it is not whole, None if the folder has no owner."""
    return _read_object(folder / OWNER)


def _read_object(path):
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _acquire(folder, flag, take_over):
    """Makes `owner.json`; returns its nonce."""
    nonce = secrets.randbits(31) | 1
    ours = {"nonce": nonce, **_this_process(), "time": time.time()}
    while not _write_or_refuse(folder, flag, lambda: _create(folder / OWNER, ours)):
        other = _write_or_refuse(folder, flag, lambda: read_owner(folder))
        if other is None:
            continue
        if other.get("nonce") == nonce:  # the file was made, but the answer was lost
            break
        if not _has_ended(other):
            # A file that is not whole yet says nothing about its owner.
            _wait_until_stale(folder, flag, other, 0 if take_over and other else STALE)
        if _write_or_refuse(folder, flag, lambda: _replace(folder, other, ours)):
            log.info(f"{folder} was taken over from {_in_words(other)}")
            break
    return nonce


def _replace(folder, other, ours):
    """Replaces the owner file if it is still that of `other`; one process at a time can."""
    marker = folder / TAKING
    if not _create(marker, ours):
        taking = _read_object(marker)
        if taking is None:
            return False
        if _has_ended(taking) or not _changes(STALE, lambda: _read_object(marker)):
            marker.unlink(missing_ok=True)
        return False
    try:
        if _read_object(folder / OWNER) != other:
            return False
        write_json(folder / OWNER, ours)
        return _read_object(folder / OWNER) == ours
    finally:
        marker.unlink(missing_ok=True)


def _wait_until_stale(folder, flag, other, seconds):
    """Returns when the owner has not renewed for so many seconds; raises `UserError` if it has."""
    in_use = UserError(
        f"--{flag}={folder} is in use by {_in_words(other)}; wait for it, use another --{flag}, "
        "or end that process"
    )
    if _has_ended(other) is False:
        raise in_use
    if seconds:
        log.warning(
            f"{folder} belongs to {_in_words(other)}; it has {seconds:g} s for a sign of life"
        )
    changes = _changes(seconds, lambda: (read_owner(folder), _read_object(folder / RENEWED)))
    if changes and read_owner(folder) == other:
        raise in_use


def _changes(seconds, value):
    """Whether `value()` changes within so many seconds; returns at once when it does."""
    before, deadline = value(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1, seconds / 20))
        if value() != before:
            return True
    return False


def _create(path, value):
    return create(path, json.dumps(value).encode())


def _this_process():
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "kernel": _kernel(),
    }


def _kernel():
    """The running kernel and its space of process numbers; None where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid):
    """When a process started, in ticks since the boot; None if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _has_ended(other):
    """Whether an owner has ended; None if this cannot be seen from here."""
    if not _kernel() or other.get("kernel") != _kernel():
        return None
    return _started(other.get("pid")) != other.get("started")


def _in_words(other):
    if not other:
        return "an unknown process"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(other.get("time", 0)))
    return f"process {other.get('pid')} on {other.get('host')}, which began on {since}"

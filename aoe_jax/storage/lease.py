"""One process owns a folder, on any file system: locks of the system hold on one host only.

The first owner makes `owner_1.json`; a process that takes the folder over from owner N makes the
file of number N + 1. Each file is made exclusively, and never changed. The owner is the process
that made the file of the highest number. Its claim counts only if, after it was made, file N is
still that of the former owner. So two processes never own the folder at once, however long one of
them is stopped between two of these steps. The owner removes the files of others when it begins,
and its own when it ends. It rewrites `owner_renewed.json` every `RENEW` seconds, whatever else it
does. Another process may take a folder over

- at once, if the owner was a process of the same kernel that has ended;
- if `owner_renewed.json` does not change for `STALE` seconds, by the clock of the one that waits;
- without this wait, with `take_over`.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import Failure, InUse, MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import COUNT, Kind, matching, misfit, or_none, read_regular, write_json
from aoe_jax.storage.locking import kernel
from aoe_jax.storage.paths import create, is_remote
from aoe_jax.storage.retry import (
    SECOND_LOOK,
    Tolerated,
    is_fault,
    is_fault_of_write,
    patiently,
    reason,
)

log = logging.getLogger(__name__)

RENEW, STALE = 10.0, 60.0  # seconds
RENEWED = "owner_renewed.json"
_CLAIM = re.compile(r"owner_(\d+)\.json")
_FILE_BYTES = 2**12
_LATE_LOOKS = 50  # a tenth of a second apart, at a file that is listed but gone
_WORD = matching(re.compile("[ -~]{1,255}"), "a line of text")
_TIME = Kind("a time", lambda value: type(value) in (int, float) and 0 <= value < 2**33)
_OWNER = {"nonce": COUNT, "host": _WORD, "pid": COUNT, "time": _TIME}
_OWNER |= {"started": or_none(COUNT), "kernel": or_none(_WORD)}


def place(folder: Path) -> tuple[int, int] | None:
    """The device and the inode of a folder, None in an object store; repeated after faults."""
    if is_remote(folder):
        return None
    found = patiently(f"{folder} cannot be read", lambda: os.stat(folder))
    return found.st_dev, found.st_ino


def lost(folder: Path, at, found: dict) -> Failure:
    """The exception for a process that owned a folder, which now has the owner `found`; at the
    start, the folder's `place` was `at`.
    """
    if place(folder) != at:
        # A start before the disk was mounted; the next one finds the run.
        return MachineFault(
            f"{folder} is not the folder that it was at the start: its disk was mounted, or "
            f"replaced, meanwhile, and has files of {in_words(found)}"
        )
    return UserError(f"{folder} was taken over by {in_words(found)}")


def is_own_file(name: str) -> bool:
    """Whether a file in a folder belongs to its ownership, by its name."""
    return bool(_CLAIM.fullmatch(name)) or name in (RENEWED, f"{RENEWED}.partial")


class Owner:
    """The ownership of a folder by this process, from `owned`."""

    def __init__(self, folder: Path, at, claim: Path, nonce: int):
        """Begins to renew the ownership that `claim` shows; `at` is the `place` of the folder."""
        self.nonce, self._place = nonce, at
        self._folder, self._claim, self._ended = folder, claim, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="renews ownership")
        self._thread.start()

    def check(self):
        """Raises `UserError` if another process has taken the folder over, and `MachineFault` if it
        cannot be read, its files are gone, or it is on another disk than at the start.
        """
        found = patiently(f"{self._folder} cannot be read", self._read)
        if found.get("nonce") != self.nonce:
            time.sleep(SECOND_LOOK)  # a claim that does not count is removed at once
            found = patiently(f"{self._folder} cannot be read", self._read)
        if found.get("nonce") != self.nonce:
            raise lost(self._folder, self._place, found)

    def is_in_place(self):
        """Whether the folder has this process's file; False if another disk is mounted there."""
        return (_read_object(self._claim) or {}).get("nonce") == self.nonce

    def _read(self):
        _, found = _newest(self._folder)
        if found is None:
            raise OSError(errno.ESTALE, f"{self._claim.name} is gone; is its disk mounted?")
        return found

    def _renew(self):
        count, tolerated = 0, Tolerated(RENEWED)
        while not self._ended.wait(RENEW):
            with tolerated:  # the next try may succeed
                if self._read().get("nonce") == self.nonce:
                    count += 1
                    write_json(self._folder / RENEWED, {"nonce": self.nonce, "count": count})

    def release(self):
        """Removes the files, if they are still those of this process."""
        self._ended.set()
        self._thread.join(timeout=5)  # a disk that hangs must not hold up the end
        with contextlib.suppress(Exception):
            if self._read().get("nonce") == self.nonce:
                (self._folder / RENEWED).unlink(missing_ok=True)
            if self.is_in_place():  # numbers begin anew in a folder without an owner
                self._claim.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder: Path, flag: str, take_over=False) -> Iterator[Owner]:
    """Owns a folder; a missing one is made, and removed at the end if it is empty. Raises `InUse`
    if another process owns it, and otherwise like `make_folder`.
    """
    is_new = make_folder(folder, flag) and not is_remote(folder)
    owner = Owner(folder, place(folder), *_acquire(folder, flag, take_over))
    try:
        yield owner
    finally:
        owner.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_folder(folder: Path, flag: str):
    """Makes a folder, and returns whether there was none. Raises `UserError`, which names the
    `flag` that gave the folder, if it cannot be made, and `MachineFault` if its disk fails.
    """
    is_there = folder.exists() if is_remote(folder) else os.path.lexists(folder)
    if is_there and not folder.is_dir():
        raise UserError(f"--{flag}={folder} is a file or a broken link; name a folder")
    if not is_remote(folder):  # a client would make the bucket
        write_or_refuse(folder, flag, lambda: folder.mkdir(parents=True, exist_ok=True))
    return not is_there


def write_or_refuse(folder, flag, write):
    """Returns `write()`; raises `UserError` at once for what only the user can change."""

    def attempt():
        try:
            return write()
        except FileNotFoundError as e:
            if is_remote(folder):
                bucket = "/".join(os.fspath(folder).split("/")[:3])
                raise UserError(f"--{flag}={folder}: there is no bucket {bucket}") from e
            # The folder was there a moment ago.
            raise OSError(errno.ESTALE, "it is gone; is its disk mounted?") from e
        except OSError as e:
            if is_fault_of_write(e):
                raise
            raise UserError(f"--{flag}={folder} cannot be written: {reason(e)}") from e

    return patiently(f"--{flag}={folder} cannot be written", attempt)


def read_owner(folder: Path) -> dict | None:
    """The content of the owner's file; empty if it is not whole, None if there is no owner."""
    return _newest(folder)[1]


def _claims(folder):
    """The files of owners by number; none if there is no folder, as in an empty store."""
    try:
        found = [(_CLAIM.fullmatch(path.name), path) for path in folder.iterdir()]
    except FileNotFoundError:
        return {}
    return {int(match[1]): path for match, path in found if match}


def _newest(folder):
    """The number of the owner and the content of its file; `(0, None)` if there is none."""
    for _ in range(_LATE_LOOKS):
        claims = _claims(folder)
        if not claims:
            return 0, None
        number = max(claims)
        content = _read_object(claims[number])
        if content is not None:
            return number, content
        time.sleep(0.1)  # it was removed meanwhile; a network disk may list it for a while
    raise OSError(errno.ESTALE, f"{claims[number].name} is listed, but it is gone")


def _read_object(path):
    """The content of an owner's file; empty if it is not valid, None if there is no file."""
    content = _bytes_of(path)
    if content is None:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content)
        if not misfit(found, _OWNER):
            return found
    return {}


def _bytes_of(path):
    """The content of a small file, or None if there is none."""
    try:
        return read_regular(path, _FILE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as e:
        if is_fault(e):
            raise
        raise UserError(f"{path} cannot be read ({reason(e)}); remove it") from e


def _acquire(folder, flag, take_over):
    """Becomes the owner; returns the file that shows it and its nonce."""
    nonce = secrets.randbits(31) | 1
    ours = {"nonce": nonce, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    ours |= {"started": _started(os.getpid()), "kernel": _kernel()}
    while True:
        number, other = write_or_refuse(folder, flag, lambda: _newest(folder))
        if other and not _has_ended(other):
            _wait_until_stale(folder, flag, other, 0 if take_over else STALE)
        elif other == {}:  # a file that is not whole yet says nothing about its owner
            _wait_until_stale(folder, flag, other, STALE)
        claim = folder / f"owner_{number + 1}.json"
        if write_or_refuse(folder, flag, lambda: _take(folder, claim, number, other, ours)):
            if other is not None:
                log.info(f"{folder} was taken over from {in_words(other)}")
            return claim, nonce


def _take(folder, claim, number, other, ours):
    """Makes the file of an owner after that of `other`; returns whether it counts."""
    if not create(claim, json.dumps(ours).encode()) and _read_object(claim) != ours:
        return False  # if it is ours, the store made it and its answer was lost
    claims = {n: (path, _read_object(path)) for n, path in _claims(folder).items()}
    _, before = claims.get(number, (None, None))
    if max(claims) != number + 1 or before != other:
        _remove(claim, ours)
        return False
    for older in sorted(claims.keys() - {number + 1}):
        _remove(*claims[older])
    return True


def _remove(path, content):
    if _read_object(path) == content:  # else it is of another process by now
        path.unlink(missing_ok=True)


def _wait_until_stale(folder, flag, other, seconds):
    """Returns once the owner has not renewed for `seconds`; raises `InUse` if it renews."""
    in_use = InUse(
        f"--{flag}={folder} is in use by {in_words(other)}. It may still be saving after a request "
        f"to stop: start again once it has ended, use another --{flag}, or end it"
    )
    if _has_ended(other) is False:
        raise in_use
    if seconds:
        log.warning(
            f"{folder} belongs to {in_words(other)}; if it does not renew its ownership within "
            f"{seconds:g} s, this process takes over"
        )

    def state():
        return patiently(
            f"{folder} cannot be read", lambda: (read_owner(folder), _bytes_of(folder / RENEWED))
        )

    before, deadline = state(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        retry.paused_at = time.monotonic()  # this is no hang
        time.sleep(min(1, seconds / 20))
        paused_at, asked = retry.paused_at, time.monotonic()
        now, answered = state(), time.monotonic()
        deadline += answered - asked
        if retry.paused_at != paused_at:  # the disk was away, for the owner too
            deadline = max(deadline, answered + 2 * RENEW)
        if now != before:
            if now[0] == other:
                raise in_use
            return


def _kernel():
    """The running kernel and the PID namespace of this process; None if they are unknown."""
    try:
        return f"{kernel()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid):
    """When a process started, in clock ticks since the boot; None if that cannot be read, 0 if it
    has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # a system may hide the processes of other users
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return 0
        except OSError:
            return None
        return None
    return 0 if fields[0] == "Z" else int(fields[19])


def _has_ended(other):
    """Whether an owner has ended; None if that is unknown, as under another kernel."""
    if not _kernel() or other.get("kernel") != _kernel():
        return None
    now, then = _started(other["pid"]), other.get("started")
    return None if now is None or then is None else now != then


def in_words(other: dict) -> str:
    """Describes an owner, given the content of its file, for messages."""
    if not other:
        return "an unknown process"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(other.get("time", 0)))
    return f"process {other.get('pid')} on {other.get('host')}, which began on {since}"

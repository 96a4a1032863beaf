"""A lease: one process owns a folder, on a disk, also a network disk, or in an object store.

The owner renews the file `owner.lease`; its token names the owner. Another process takes it over if
it stays unchanged for `STALE` seconds by the clock of the one that waits; on a disk at once if the
owner was a process of this host that has ended.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import filelock

from aoe_jax.errors import InUse, UserError
from aoe_jax.storage.files import make_folder, read_regular, write_or_refuse
from aoe_jax.storage.paths import create, file_system, is_remote
from aoe_jax.storage.retry import Tolerated, patiently

log = logging.getLogger(__name__)
NAME = "owner.lease"
RENEW, STALE = 5.0, 45.0  # seconds; all processes that share a folder need the same STALE
_SETTLE = 1.0  # seconds after which a process that takes over at the same time can be seen
_FIELD = re.compile(r"^(token|host|pid)=([!-~]{1,255})$", re.MULTILINE)


@contextlib.contextmanager
def leased(folder: Path, flag: str, take_over=False):
    """Owns a folder, and yields the lease, whose `check` comes before the folder's files are
    replaced. A missing folder is made, and removed at the end if it is empty. Waits while an owner
    does not renew, except with `take_over`. Raises `InUse` if one does, else like `make_folder`.
    """
    is_new = make_folder(folder, flag) and not is_remote(folder)
    lease = (_InStore if is_remote(folder) else _OnDisk)(folder)
    try:
        lease.acquire(flag, take_over)
        yield lease
    finally:
        lease.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def token_of(folder: Path) -> str | None:
    """The token of a folder's owner, the same in all processes; None if there is none."""
    return _fields(_seen(folder / NAME)).get("token")


class _OnDisk:
    def __init__(self, folder):
        self._folder, self._file = folder, folder / NAME
        settings = {"lease_duration": STALE, "heartbeat_interval": RENEW, "thread_local": False}
        self._lock = filelock.SoftFileLease(os.fspath(self._file), **settings)

    def check(self):
        """Raises `UserError` if another process has taken the folder over, and `MachineFault` if
        the file is gone or cannot be read for `retry_seconds`.
        """
        for _ in range(2):  # a process that tries to take over may show its own file for a moment
            found = patiently(f"{self._folder} cannot be read", self._present)
            if _fields(found).get("token") == self.token and self._is_renewed():
                return
            time.sleep(_SETTLE)
        raise UserError(f"{self._folder} was taken over by {_in_words(found)}")

    def acquire(self, flag, take_over):
        before, since, is_stale = None, time.monotonic(), take_over
        while not write_or_refuse(self._folder, flag, lambda: self._take(is_stale, take_over)):
            found = write_or_refuse(self._folder, flag, lambda: _seen(self._file))
            waited = time.monotonic() - since
            is_renewed = found != before and not take_over
            if found and before and (is_renewed or waited > 2 * STALE):
                raise InUse(
                    f"--{flag}={self._folder} is in use by {_in_words(found)}. It may still be "
                    f"saving: start again once it has ended, use another --{flag}, or end it"
                )
            if found and not before:
                owner = f"{self._folder} belongs to {_in_words(found)}"
                log.warning(f"{owner}; this process takes over if it does not renew its lease")
                before, since, waited = found, time.monotonic(), 0.0
            is_stale = take_over or waited >= STALE
            time.sleep(RENEW / 10)
        if before:
            log.warning(f"{self._folder} was taken over from {_in_words(before)}")

    @property
    def token(self):
        """The token of this process."""
        return self._lock.token

    def release(self):
        """Removes the file if it is that of this process."""
        with contextlib.suppress(OSError):
            self._lock.release(force=True)

    def _take(self, is_stale, by_force):
        if by_force:
            self._file.unlink(missing_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.LeaseSettingsMismatch as e:
            raise UserError(f"{e}; remove the file if no process uses its folder") from e
        except filelock.Timeout:
            return False
        return True

    def _is_renewed(self):
        if self._lock.compromise:  # the disk was away for so long that filelock has given up
            self.release()
            return self._take(is_stale=False, by_force=False)
        return True

    def _present(self):
        if (found := _seen(self._file)) is None:
            raise OSError(errno.ESTALE, f"{self._file} is gone; is its disk mounted?")
        return found


class _InStore(_OnDisk):
    token = None

    def __init__(self, folder):
        self._folder, self._file, self._ended = folder, folder / NAME, threading.Event()
        self.token = secrets.token_hex(16)

    def release(self):
        self._ended.set()
        with contextlib.suppress(Exception):
            if self._is_renewed():
                self._file.unlink()

    def _take(self, is_stale, by_force):
        if not create(self._file, self._content()) and is_stale:
            self._file.write_bytes(self._content())  # the last process that writes is the owner
            time.sleep(_SETTLE)
        if is_owner := self._is_renewed():
            threading.Thread(target=self._renew, daemon=True, name="renews the lease").start()
        return is_owner

    def _is_renewed(self):
        return token_of(self._folder) == self.token

    def _content(self):
        host = quote(socket.gethostname())[:255] or "?"
        fields = f"token={self.token}\nhost={host}\npid={os.getpid()}\n"
        return f"{fields}renewed={time.monotonic()}\n".encode()

    def _renew(self):
        tolerated = Tolerated(NAME)  # the next try may succeed
        while not self._ended.wait(RENEW):
            with tolerated:
                if self._is_renewed():
                    self._file.write_bytes(self._content())


def _seen(file):
    try:
        if is_remote(file):  # in one request, because the owner may replace it meanwhile
            content = file_system(file).cat_file(os.fspath(file), start=0, end=4096)
            return content.decode("ascii", "replace"), 0
        return read_regular(file, 4096).decode("ascii", "replace"), os.stat(file).st_mtime_ns
    except FileNotFoundError:
        return None


def _fields(seen):
    return dict(_FIELD.findall(seen[0])) if seen else {}


def _in_words(seen):
    fields = _fields(seen)
    return f"process {fields.get('pid', '?')} on {fields.get('host', 'an unknown host')}"

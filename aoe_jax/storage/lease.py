"""Leases: at most one process owns a folder on a disk, on a network disk or in an object store.

The owner renews the file `owner.lease`. Another process takes the folder over if the file does not
change for `STALE` seconds. On a disk it takes over at once if the owner ran on its host and ended.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import threading
import time
from pathlib import Path

import filelock

from aoe_jax.errors import InUse, UserError
from aoe_jax.storage.files import make_folder, read_bytes, write_or_refuse
from aoe_jax.storage.paths import create, host_name, is_remote
from aoe_jax.storage.retry import patiently

log = logging.getLogger(__name__)
NAME = "owner.lease"
RENEW, STALE = 5.0, 45.0  # seconds; all processes that use the same folder need the same STALE
_FIELD = re.compile(r"^(token|host|pid|renewed)=([!-~]{1,255})$", re.MULTILINE)
_OWNER = "process {pid} on {host}"
_SETTLE = 1.0  # seconds; if several processes take over, only one is the owner after this time


@contextlib.contextmanager
def leased(folder: Path, flag: str):
    """A context that owns a folder, and makes it if it is missing. Yields the lease; call its
    `check` before files are replaced. If another process owns the folder, waits until the lease of
    that process is stale, or raises `InUse` when it is renewed.
    """
    make_folder(folder, flag)
    lease = (_InStore if is_remote(folder) else _OnDisk)(folder)
    try:
        write_or_refuse(folder, flag, lambda: _acquire(lease, flag))
        yield lease
    finally:
        lease.release()
        if not is_remote(folder):
            with contextlib.suppress(OSError):  # the folder has files, so it stays
                folder.rmdir()


def _acquire(lease, flag):
    folder, started, waited = lease.folder, time.monotonic(), 0.0
    seen = owner_of(folder)
    while not lease.take(waited):
        if (found := owner_of(folder)) and found != seen:
            wanted = f"end it, wait while it saves, or use another --{flag}"
            raise InUse(f"--{flag}={folder} is in use by {_OWNER.format_map(found)}; {wanted}")
        if waited > 2 * STALE and not is_remote(folder):  # filelock cannot read the file
            (folder / NAME).unlink(missing_ok=True)
        if found and not waited:
            log.warning(f"{folder} belongs to {_OWNER.format_map(found)}; waiting {STALE:g} s")
        waited = time.monotonic() - started
        time.sleep(RENEW / 10)
    if seen:
        log.warning(f"{folder} was taken over from {_OWNER.format_map(seen)}")


def owner_of(folder: Path) -> dict:
    """Returns the lease file's fields, and on a disk its time of renewal; {} without the file."""
    with contextlib.suppress(FileNotFoundError):
        fields = _FIELD.findall(read_bytes(folder / NAME, 4096).decode("ascii", "replace"))
        changed = 0 if is_remote(folder) else os.stat(folder / NAME).st_mtime_ns
        known = {"token": "", "pid": "?", "host": "an unknown host", "changed": changed}
        return known | dict(fields)
    return {}


class _OnDisk:
    def __init__(self, folder):
        self.folder, self.token = folder, None
        settings = {"lease_duration": STALE, "heartbeat_interval": RENEW, "thread_local": False}
        self._lock = filelock.SoftFileLease(os.fspath(folder / NAME), **settings)

    def is_held(self) -> bool:
        return owner_of(self.folder).get("token") == self.token

    def check(self):
        """Raises `UserError` after a take-over, and `MachineFault` if the file stays missing."""
        for _ in range(2):  # a failing attempt to take over replaces the file for a moment
            found = patiently(f"{self.folder} cannot be read", self._present)
            if found["token"] == self.token:
                return
            time.sleep(_SETTLE)
        raise UserError(f"{self.folder} was taken over by {_OWNER.format_map(found)}")

    def _present(self):
        if found := owner_of(self.folder):
            return found
        raise OSError(errno.ESTALE, f"{NAME} is gone; is its disk mounted?")

    def take(self, waited):
        with contextlib.suppress(filelock.Timeout):
            self._lock.acquire(timeout=0)
            self.token = self._lock.token
        return self._lock.is_locked

    def release(self):
        with contextlib.suppress(OSError):
            self._lock.release(force=True)


class _InStore(_OnDisk):
    def __init__(self, folder):
        self.folder, self.token, self._ended = folder, secrets.token_hex(16), threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="renews the lease")

    def _content(self):
        fields = f"token={self.token}\nhost={host_name()}\npid={os.getpid()}"
        return f"{fields}\nrenewed={time.monotonic()}\n".encode()

    def take(self, waited):
        file = self.folder / NAME
        if not create(file, self._content()) and waited >= STALE:
            file.write_bytes(self._content())  # the last process to write becomes the owner
            time.sleep(_SETTLE)
        if is_owner := self.is_held():
            self._renewer.start()
        return is_owner

    def _renew(self):
        while not self._ended.wait(RENEW):
            with contextlib.suppress(Exception):  # after an error, the next renewal may succeed
                if self.is_held():
                    (self.folder / NAME).write_bytes(self._content())

    def release(self):
        self._ended.set()
        with contextlib.suppress(Exception):
            self._renewer.join(RENEW)  # otherwise the thread could write the file after its removal
            if self.is_held():
                (self.folder / NAME).unlink()

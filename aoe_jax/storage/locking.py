"""Locks between processes; the system frees them when a process ends, however it ends."""

import contextlib
import errno
import fcntl
import glob
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import UserError
from aoe_jax.storage.retry import is_fault_of_write, patiently

_ABANDONED = 24 * 3600.0  # seconds without a write after which another host has given up


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Waits for the lock, and holds it; raises `UserError` if its folder cannot be written."""

    def touch():
        try:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()
        except OSError as error:
            if is_fault_of_write(error):
                raise
            raise UserError(
                f"{lock_file.parent} cannot be written ({error.strerror}); set data.cache, or the "
                "data.path of a TFDS data set, to a writable folder"
            ) from error

    patiently(f"{lock_file.parent} cannot be written", touch)
    with open(lock_file, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def partial_path(path: Path) -> Path:
    """The path at which the process that holds the lock of `path` makes its content.

    On some network disks a lock excludes only processes of the same host, so each host has its own
    path. Removes what killed processes left: there, and where another host has given up.
    """
    partial = path.with_name(f"{path.name}.partial-{_host()}")
    for old in path.parent.glob(f"{glob.escape(path.name)}.partial*"):
        with contextlib.suppress(FileNotFoundError):  # another host removes it too
            if old == partial or time.time() - old.stat().st_mtime > _ABANDONED:
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink()
    return partial


def _host():
    """The running kernel, whose processes exclude each other by locks; the host if unknown."""
    try:
        return kernel()
    except OSError:
        return socket.gethostname()


def kernel() -> str:
    """The name of the running kernel, another one after each boot; raises `OSError` off Linux."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder at `partial_path(folder)`, and moves it to `folder` at the end, unless
    another host has done that before. After an exception it is removed.
    """
    partial = partial_path(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

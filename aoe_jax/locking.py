"""Locks between processes; the system frees them when a process ends, however it ends."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Wait for the lock on `lock_file`, and hold it.

    Raises:
        UserError: the folder of `lock_file` cannot be written.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock_file.touch()
    except OSError as error:
        raise UserError(
            f"{lock_file.parent} cannot be written ({error.strerror}); set data.cache, or the "
            "data.path of a TFDS data set, to a folder that can"
        ) from error
    with open(lock_file, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_folder(folder: Path, flag: str):
    """Make a folder if there is none.

    Raises:
        UserError: it can't be made; names the `flag` that gave it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={folder} can't be written: {error.strerror}") from error


@contextlib.contextmanager
def alone_in(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder if there is none, and lock it itself, without a file in it.

    Raises:
        UserError: it can't be made, or another process holds the lock; names the `flag` that gave
            the folder.
    """
    make_folder(folder, flag)
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.ExitStack() as held:
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--{flag}={folder}: another process is at work there; wait for it, or use another "
                f"--{flag}"
            ) from error
        except OSError as error:  # a network disk without locks
            log.warning(
                f"{folder} can't be locked ({error.strerror}): make sure that no other process "
                "writes there"
            )
        yield

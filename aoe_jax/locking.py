"""One process at a time."""

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
    """Hold the lock on `lock_file`, waiting for it; the system frees it when the process ends,
    however it ends.

    Raises:
        UserError: the folder of `lock_file` cannot be written.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock_file, "w")  # noqa: SIM115  closed below; a failure in the caller's block must not be caught here
    except OSError as error:
        raise UserError(
            f"{lock_file.parent} cannot be written ({error.strerror}); set data.cache, or the data.path of a TFDS data "
            "set, to a folder that can"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def alone_in(folder: Path, flag: str) -> Iterator[None]:
    """Keep other processes out of `folder` meanwhile; the system frees it when the process ends,
    however it ends.

    Raises:
        UserError: another process is there; names the `flag` of the command line that gave the
          folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--{flag}={folder}: another process is at work there; wait for it, or use another --{flag}"
            ) from error
        except OSError as error:  # a network disk without locks
            log.warning(
                "%s can't be locked (%s): see to it that no other process writes there",
                folder,
                error.strerror,
            )
        yield
    finally:
        os.close(descriptor)

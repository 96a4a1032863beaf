"""Locks between processes; the system frees them when a process ends, however it ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import UserError
from aoe_jax.faults import is_fault, is_forbidden, patiently


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Waits for the lock, and holds it; raises `UserError` if its folder cannot be written."""

    def touch():
        try:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()
        except OSError as error:
            if is_fault(error) and not is_forbidden(error):
                raise
            raise UserError(
                f"{lock_file.parent} cannot be written ({error.strerror}); set data.cache, or the "
                "data.path of a TFDS data set, to a writable folder"
            ) from error

    patiently(f"{lock_file.parent} cannot be written", touch)
    with open(lock_file, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

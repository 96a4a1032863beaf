"""One process at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from aoe_jax.errors import UserError


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold the lock on `lock_file`, waiting for it; the system frees it when the process ends, however it ends.

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

"""Exceptions that end a program; the command line prints a last line and sets an exit status."""

import errno
import reprlib

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 1000
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 100
shown = _repr.repr  # of a value from a file or a flag; long and deep values are cut


class UserError(Exception):
    """A mistake that the user can correct: a bad value, a missing file, a full disk.

    The message names the field or file, its value and what would be right. A traceback is shown
    only with `--debug`.
    """

    status = 2


class DivergedError(Exception):
    """`train.max_skipped` updates in a row were skipped."""

    status = 4


class Stopped(BaseException):
    """The program was asked to stop. A signal raises it anywhere, so handlers of `Exception` must
    not catch it.
    """

    others_go_on = False  # True: other processes don't stop, so this one must not wait for them


class Preempted(Stopped):
    """SIGTERM: the state is saved, and nothing is lost."""

    status = 0


class Interrupted(Stopped):
    """SIGINT (Ctrl-C), with the exit status of shells."""

    status = 130


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full; some libraries have their own errors."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)

"""Exceptions that end a program; the command line prints a last line and sets an exit status."""

import contextlib
import reprlib

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 1000
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 100
shown = _repr.repr  # repr for values from files and flags; it cuts long and deep values


class Failure(Exception):
    """Ends a program with `status` and one line; a traceback is shown only with `--debug`."""

    status = 1


class UserError(Failure):
    """A mistake that the user can correct: a bad value, a missing file.

    The message names the field or file, its value and a right value.
    """

    status = 2


class InUse(UserError):
    """Another process owns the folder. It may be about to end, so a later start may succeed."""

    status = 5


class DivergedError(Failure):
    """`train.max_skipped` updates in a row were skipped."""

    status = 4


class MachineFault(Failure):
    """A disk, the network or memory failed for `--retry_seconds`; a later start may succeed."""

    status = 5


class Hang(Failure):
    """The run made no progress for `train.hang_timeout`."""

    status = 6


class FailedElsewhere(Failure):
    """Another process failed, with this status; its own log says why."""

    def __init__(self, processes, status):
        """Takes the numbers of the processes that failed."""
        super().__init__(f"process {', '.join(map(str, processes))} failed; see its log")
        self.status = status


class Stopped(BaseException):
    """A signal asked the program to stop. It may be raised anywhere, so it is no `Exception`."""

    others_go_on = False  # True: other processes do not stop, so this one must not wait for them


class Preempted(Stopped):
    """SIGTERM: the run ended after saving its state."""

    status = 0


class Terminated(Stopped):
    """SIGTERM ended a command without state, which removes unfinished output."""

    status = 143
    others_go_on = True


class Interrupted(Stopped):
    """SIGINT (Ctrl-C) ended the program. The exit status is that of shells."""

    status = 130


@contextlib.contextmanager
def naming(place):
    """Puts `place`, such as a file, before the message of a `UserError`."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{place}: {e}") from e

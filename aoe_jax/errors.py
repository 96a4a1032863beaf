"""Exceptions that end a program. `cli.execute` prints each as one line and sets the exit status."""

import contextlib
import reprlib
import traceback

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 1000
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 100
shown = _repr.repr  # `repr` for values from files and flags, shortened if long or deeply nested


class Failure(Exception):
    """Ends a program with exit status `status` and one line; only `--debug` shows a traceback."""

    status = 1


class UserError(Failure):
    """A mistake that the user can correct: a bad value, a missing file.

    The message names the field or file, its value and a right value.
    """

    status = 2


class InUse(UserError):
    """Another process owns the folder. Starting the command again later may succeed."""

    status = 5


class DivergedError(Failure):
    """`train.max_skipped` updates in a row were skipped."""

    status = 4


class MachineFault(Failure):
    """A fault of a disk, a network or memory. Starting the command again later may succeed."""

    status = 5


class Hang(Failure):
    """The run made no progress for `train.hang_timeout` seconds."""

    status = 6


class FailedElsewhere(Failure):
    """Other processes of the run failed with exit status `status`; their logs say why."""

    def __init__(self, processes, status):
        """`processes` are the numbers of the processes that failed."""
        super().__init__(f"process {', '.join(map(str, processes))} failed; see its log")
        self.status = status


class Stopped(BaseException):
    """A signal asked the program to stop. `except Exception` does not catch this class."""

    others_go_on = False  # True: other processes continue, so this one must exit without waiting


class Preempted(Stopped):
    """A run saved its state and ended after SIGTERM or SIGHUP."""

    status = 0


class Terminated(Stopped):
    """SIGTERM ended a command that has no state to save. The command removes unfinished output."""

    status = 143
    others_go_on = True


class Interrupted(Stopped):
    """SIGINT (Ctrl-C) ended the program. Shells use the same exit status, 128 + 2."""

    status = 130


@contextlib.contextmanager
def running(flag, file, what):
    """A context that runs code of the user's Python `file`: any exception becomes a `UserError`,
    whose message begins with `flag`, such as `--config=FILE`. `what` is the code's name.
    """
    try:
        yield
    except UserError:
        raise
    except SystemExit as e:
        raise UserError(f"{flag}: {what} called sys.exit({e.code!r})") from e
    except Exception as e:
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        line = f" (line {frames[-1].lineno} of {file})" if frames else ""
        raise UserError(f"{flag}: {text}{line}") from e


@contextlib.contextmanager
def naming(place):
    """A context that puts `place`, such as a file name, before the message of a `UserError`."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{place}: {e}") from e

"""How a program ends before its time: what the command line turns into a last line and an exit
status.
"""

import errno


class UserError(Exception):
    """A mistake the user can mend: a bad value, a missing file, an unknown name, a full disk.

    The message names the field or file, its value and what would be right. The command line prints
    it on stderr and ends with exit status 2; no traceback is shown unless `--debug` is given.
    """

    status = 2


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room; libraries raise errors of their own that only say
    so.
    """
    return (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    ) or "No space left on device" in str(error)


class DivergedError(Exception):
    """`train.max_skipped` updates in a row were skipped: training can't get on by itself. Exit
    status 4.
    """

    status = 4


class Stopped(BaseException):
    """The program was asked to stop. Raised by a signal anywhere, so no handler of ordinary
    exceptions takes it.
    """

    status = 1
    others_go_on = False  # other processes may wait for this one, which must not wait for them


class Preempted(Stopped):
    """SIGTERM, as where a machine is taken away: what is lost is nothing, so the exit status is 0."""

    status = 0


class Interrupted(Stopped):
    """SIGINT (Ctrl-C), with the exit status that shells give it."""

    status = 130

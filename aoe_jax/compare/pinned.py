"""Starts a command on one core, and has it asked to stop should the process that started it be
killed (on Linux).

Run as a script, `python pinned.py CORE COMMAND ...`, which becomes the command; CORE may be `any`.
The same between fork and exec would be unsafe in a process with threads.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import sys

PR_SET_PDEATHSIG = 1


def main():
    """Sets it up and becomes the command."""
    core, *command = sys.argv[1:]
    if sys.platform == "linux":
        if core != "any":
            os.sched_setaffinity(0, {int(core)})
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # A session is a group of its own to the scheduler, which forgets that a comparison was
        # started by `nice`.
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/autogroup").write_text(str(os.nice(0)))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

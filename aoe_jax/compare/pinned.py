"""Starts a command on one core, and has it asked to stop should the process that started it be killed (on Linux).

Run as a script, `python pinned.py CORE COMMAND ...`, which becomes the command; CORE may be `any`. The same between fork and
exec would be unsafe in a process with threads.
"""

import ctypes
import os
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
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

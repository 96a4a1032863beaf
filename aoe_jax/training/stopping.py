"""Requests to stop: SIGTERM, sent before a machine is taken away, and SIGINT from a keyboard."""

import contextlib
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future

from aoe_jax.errors import Interrupted, Preempted

# Becomes a command after PR_SET_PDEATHSIG (1), which sends SIGTERM (15) when the parent dies.
_BOUND = """
import ctypes, os, sys
_, parent, core, *command = sys.argv
if core:
    os.sched_setaffinity(0, {int(core)})
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(parent):
        sys.exit(143)
os.execv(command[0], command)
"""


def bound(command, core=None):
    """The command line of a child that becomes `command`, which begins with the path of a program.
    On Linux the child gets SIGTERM when the thread that has started it ends, also by SIGKILL.
    `core` is the only CPU core that it may use; None: any.
    """
    core = "" if core is None else str(core)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), core, *command]


def interruptibly(call, seconds=None):
    """Returns `call()`, made in another thread, so that signals are handled meanwhile. A library
    would hold them up until it returns. Raises `TimeoutError` after so many seconds.
    """
    result = Future()

    def work():
        try:
            result.set_result(call())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=work, daemon=True, name="works for the main thread").start()
    return result.result(seconds)


class StopRequests:
    """Turns signals into an exception or, while training, into an answer at the next step.

    A second SIGINT kills. Further SIGTERMs do nothing, because a process often receives one from
    its supervisor and one from the system. With several processes, JAX's preemption service handles
    a SIGTERM to any of them and stops all at the same step. `advice` says how to go on after a stop
    outside of training.
    """

    def __init__(
        self, advice="the same command goes on from the newest checkpoint, or begins anew"
    ):
        """Handles no signal before `listen`."""
        self._advice = advice
        self._signal, self._at_steps, self._several, self._questions = None, False, False, 0
        self._interrupted = False  # whether this one of several processes received SIGINT
        self._arrivals = None  # the end of a pipe that gets the number of each signal at once
        self._terminated, self._answered = None, False

    def listen(self):
        """Handles signals from now on; call it before anything takes long."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        self._arrivals, writing = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(writing)

    @property
    def terminated(self):
        """The time of the first SIGTERM, on the monotonic clock; None if there was none, or once
        `asked` has reported it. It is known even while the main thread is blocked. With several
        processes it is None, because JAX handles the signal.
        """
        if self._answered:
            return None
        if self._arrivals is not None and self._terminated is None:
            with contextlib.suppress(BlockingIOError):
                if signal.SIGTERM in os.read(self._arrivals, 64):
                    self._terminated = time.monotonic()
        return self._terminated

    @contextlib.contextmanager
    def between_steps(self, several):
        """A context in which signals raise nothing, and `asked` reports them. `several` says
        whether the process belongs to a cluster, even if it is the only one.
        """
        self._at_steps, self._several = True, several
        try:
            yield
        finally:
            self._at_steps = False

    def asked(self):
        """Whether to stop now; all processes must ask at the same places of the program."""
        if self._several:
            from jax.experimental import multihost_utils  # preparing data needs no JAX

            self._questions += 1
            if multihost_utils.reached_preemption_sync_point(self._questions):
                self._signal = signal.SIGINT if self._interrupted else signal.SIGTERM
        self._answered = self._signal is not None
        return self._answered

    def end(self, message):
        """The exception that ends the run."""
        if self._signal == signal.SIGTERM:
            return Preempted(f"preempted: {message}")
        return Interrupted(f"interrupted: {message}")

    def _take(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        elif self._signal is not None:
            return
        if self._at_steps and self._several:
            self._interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)  # JAX takes it, and tells the others
            return
        self._signal = number
        if not self._at_steps:
            stopped = self.end(self._advice)
            stopped.others_go_on = True
            raise stopped

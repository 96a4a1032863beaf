"""Requests to stop a training run: SIGTERM (preemption), SIGHUP (a closed terminal) and Ctrl-C."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils

from aoe_jax.errors import Interrupted, Preempted


def _tell(message):
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, message)


class StopRequests:
    """Records the first SIGTERM, SIGHUP or SIGINT; the run calls `asked` between steps. A further
    SIGINT ends the process at once, with exit status 130. Other signals then have no effect:
    schedulers signal a whole group of processes, whose parent asks its children again.

    Once `jax.distributed` has started, JAX handles a SIGTERM to any process: all processes stop at
    the same step, and further SIGTERMs have no effect.
    """

    def __init__(self):
        self._signal, self._is_told, self._questions = None, False, 0

    def listen(self):
        """Handles signals from now on; call it before `jax.distributed` starts."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup`
                signal.signal(number, self._take)

    def _take(self, number, frame):
        if self._signal is None:
            self._signal = number
            _tell(b"stopping; Ctrl-C ends the process at once\n")
        elif number == signal.SIGINT:
            _tell(b"stopped at once\n")
            os._exit(Interrupted.status)

    def asked(self):
        """Whether to stop now. All processes must call it equally often, after the same steps."""
        if not jax.distributed.is_initialized():
            return self._signal is not None
        if self._signal is not None and not self._is_told:
            self._is_told = True
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler notifies the other processes
        self._questions += 1
        is_asked = multihost_utils.reached_preemption_sync_point(self._questions)
        if is_asked and self._signal is None:
            self._signal = signal.SIGTERM
        return is_asked

    def end(self, message):
        """The exception that ends the run."""
        if self._signal == signal.SIGINT:
            return Interrupted(f"interrupted: {message}")
        return Preempted(f"preempted: {message}")

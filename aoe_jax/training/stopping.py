"""Requests to stop a training run: SIGTERM, sent before a machine is taken away, and Ctrl-C."""

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils

from aoe_jax.errors import Interrupted, Preempted, Terminated


class StopRequests:
    """Records the first SIGTERM or SIGINT; the run checks for it between steps. A second one ends
    the process at once, with the status that shells use.

    Once `jax.distributed` has started, JAX handles a SIGTERM to any process and stops all processes
    at the same step; further SIGTERMs then do nothing.
    """

    def __init__(self):
        self._signal, self._is_told, self._questions = None, False, 0

    def listen(self):
        """Handles signals from now on; call it before `jax.distributed` starts."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number, frame):
        if self._signal is not None:
            print("stopped at once by a second signal", file=sys.stderr, flush=True)
            os._exit(Terminated.status if number == signal.SIGTERM else Interrupted.status)
        self._signal = number

    def asked(self):
        """Whether to stop now; all processes must call it at the same places of the program."""
        if not jax.distributed.is_initialized():
            return self._signal is not None
        if self._signal is not None and not self._is_told:
            self._is_told = True
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it, and tells the other processes
        self._questions += 1
        is_asked = multihost_utils.reached_preemption_sync_point(self._questions)
        if is_asked and self._signal is None:
            self._signal = signal.SIGTERM
        return is_asked

    def end(self, message):
        """The exception that ends the run."""
        if self._signal == signal.SIGTERM:
            return Preempted(f"preempted: {message}")
        return Interrupted(f"interrupted: {message}")

"""What is watched so that nobody has to: updates that are skipped, spikes of the loss, dead
experts, and a heartbeat.
"""

import logging
import math
import os
import socket
import time
from collections import deque
from pathlib import Path

import numpy as np

from aoe_jax.errors import DivergedError
from aoe_jax.experts.balance import dead_experts
from aoe_jax.json_files import write_json

log = logging.getLogger(__name__)

SPIKE_WINDOW, SPIKE_MINIMUM, SPIKE_DEVIATIONS = 128, 32, 6
DEAD_AFTER = 3  # logged steps in a row without a token


class Health:
    """Looks at the metrics of every step."""

    def __init__(self, max_skipped, batch_size, skipped_in_row=0):
        """`max_skipped`: `train.max_skipped`; `batch_size`: sequences in a batch; `skipped_in_row`:
        how many so far.
        """
        self._max_skipped, self._batch_size = max_skipped, batch_size
        self.skipped_in_row = skipped_in_row
        self._losses = deque(maxlen=SPIKE_WINDOW)
        self._idle_for, self._dead = None, set()

    def step(self, step, loss, grad_norm, finite):
        """Takes in the loss (nats), the gradient norm before clipping and whether both are finite.

        Raises:
          DivergedError: the last `max_skipped` steps were all skipped.
        """
        if not finite:
            self.skipped_in_row += 1
            first = (step - 1) * self._batch_size
            log.warning(
                "step %d skipped: loss %g, gradient norm %g; its batch is number %d, sequences %d to %d of the run's order",
                *(step, loss, grad_norm, step, first, first + self._batch_size - 1),
            )
            if self.skipped_in_row >= self._max_skipped:
                raise DivergedError(
                    f"stopped at step {step}: the last {self.skipped_in_row} updates were skipped, for loss or gradient "
                    f"weren't finite (train.max_skipped={self._max_skipped}). Look at the data; or, if the model itself is "
                    "broken, delete the newest checkpoints, or lower train.learning_rate in another --workdir"
                )
            return
        self.skipped_in_row = 0
        if len(self._losses) >= SPIKE_MINIMUM:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + SPIKE_DEVIATIONS * deviation:
                log.warning(
                    "loss spike at step %d: %.4f, the last %d steps had %.4f ± %.4f; gradient norm %.3g",
                    *(step, loss, len(self._losses), mean, deviation, grad_norm),
                )
        self._losses.append(loss)

    def load(self, step, load, live=None):
        """Takes in the load `[L, n]` of a logged step; warns of experts that have had no token for
        some of them.

        `live`, of `LayerStats`: places that no expert has aren't dead.
        """
        if load.shape[-1] == 1:
            return
        idle = dead_experts(load, live)
        self._idle_for = np.where(idle, 1 if self._idle_for is None else self._idle_for + 1, 0)
        dead = {tuple(map(int, place)) for place in np.argwhere(self._idle_for >= DEAD_AFTER)}
        if new := sorted(dead - self._dead):
            names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in new[:8])
            log.warning(
                "dead experts at step %d, without a token in %d logged steps: %s%s (%d of %d in all)",
                *(step, DEAD_AFTER, names, ", ..." if len(new) > 8 else "", len(dead), load.size),
            )
        self._dead = dead


class Heartbeat:
    """`workdir/heartbeat.json`: what the run is at, written when that changes and while it goes on,
    once in a second.
    """

    def __init__(self, workdir: Path):
        """Writes nothing before `start`: the first process calls it when the run has its folder to
        itself, no other does.
        """
        self._path = workdir / "heartbeat.json"
        self._started, self._written, self._status = False, -math.inf, None
        self.step = None

    def start(self):
        """From now on the file is written."""
        self._started = True

    def beat(self, status, step=None):
        """Status: compiling, training, validating, saving; finished, preempted, interrupted,
        diverged, failed.
        """
        self.step = step if step is not None else self.step
        now = time.monotonic()
        if not self._started or (status == self._status and now < self._written + 1):
            return
        self._written, self._status = now, status
        write_json(
            self._path,
            {
                "status": status,
                "step": self.step,
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            },
        )

"""Warnings of a run: skipped updates, loss spikes and dead experts."""

import logging
from collections import deque

import numpy as np

from aoe_jax.config.training import TrainConfig
from aoe_jax.errors import DivergedError
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.load_statistics import dead_experts

log = logging.getLogger(__name__)

SPIKE_WINDOW, SPIKE_MINIMUM, SPIKE_DEVIATIONS = 128, 32, 6
DEAD_AFTER = 3  # logged steps


class Health:
    """Checks the metrics of every step, warns, and counts skipped updates in `progress`."""

    def __init__(self, config: TrainConfig, progress: Progress):
        self._config, self._progress = config, progress
        self._losses = deque(maxlen=SPIKE_WINDOW)
        self._idle_for = 0  # logged steps in a row without a token for an expert, [L, n]

    def step(self, step, loss, grad_norm, finite):
        """Takes the loss (nats), the gradient norm before clipping and whether both are finite.
        Raises `DivergedError` if the last `train.max_skipped` updates were all skipped.
        """
        if not finite:
            self._skipped(step, loss, grad_norm)
            return
        self._progress.skipped_in_row = 0
        if len(self._losses) >= SPIKE_MINIMUM:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + SPIKE_DEVIATIONS * deviation:
                log.warning(
                    f"loss spike at step {step}: {loss:.4f}, the last {len(self._losses)} steps "
                    f"had {mean:.4f} ± {deviation:.4f}; gradient norm {grad_norm:.3g}"
                )
        self._losses.append(loss)

    def _skipped(self, step, loss, grad_norm):
        self._progress.skipped_in_row += 1
        first = (step - 1) * self._config.batch_size
        log.warning(
            f"step {step} skipped: loss {loss:g}, gradient norm {grad_norm:g}; its batch has the "
            f"sequences {first} to {first + self._config.batch_size - 1} of the run's order"
        )
        if self._progress.skipped_in_row >= self._config.max_skipped:
            raise DivergedError(
                f"stopped at step {step}: the last {self._progress.skipped_in_row} updates were "
                "skipped because the loss or the gradient was not finite "
                f"(train.max_skipped={self._config.max_skipped}). Look at the data; or, if the "
                "model itself is broken, continue from an earlier checkpoint with --go-back=STEP, "
                "or lower train.learning_rate in another --workdir"
            )

    def load(self, step, load, live=None):
        """Takes `LayerStats.load` and `live`, `[L, n]`, of a logged step. Warns of live experts
        that had no token in `DEAD_AFTER` logged steps in a row.
        """
        if load.shape[-1] == 1:
            return
        self._idle_for = np.where(dead_experts(load, live), self._idle_for + 1, 0)
        new = np.argwhere(self._idle_for == DEAD_AFTER)
        if len(new):
            names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in new[:8])
            names += ", ..." if len(new) > 8 else ""
            log.warning(
                f"dead experts at step {step}, without a token in {DEAD_AFTER} logged steps: "
                f"{names} ({np.sum(self._idle_for >= DEAD_AFTER)} of {load.size} in all)"
            )

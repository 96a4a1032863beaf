"""The line of a terminal that shows a run: step, loss, speed, load of the experts, time left."""

import contextlib
import logging
import sys

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

MAX_EXPERTS = 32  # with more, the line shows no columns
_STATUS_WIDTH = len("validating")
_COLUMNS = "▁▂▃▄▅▆▇█"
_FORMAT = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


def load_columns(load):
    """The loads of experts `[n]` as a text of n columns; half of the height is the mean load."""
    height = load * len(_COLUMNS) / max(2 * load.mean(), 1e-9)
    return "".join(_COLUMNS[min(int(h), len(_COLUMNS) - 1)] for h in height)


class Bar:
    """A writer of figures (`writers.py`): the last line of a terminal, with the log above it."""

    name = "the progress bar"

    def __init__(self, first_step, steps, shows=True):
        """Shows nothing if `shows` is false or if stderr is no terminal."""
        self.shows = shows and sys.stderr.isatty()
        self._redirected = contextlib.ExitStack()
        self._status, self._loss, self._figures = "starting", "", ""
        if self.shows:
            self._bar = tqdm(
                total=steps,
                initial=first_step,
                desc=self._status,
                bar_format=_FORMAT,
                dynamic_ncols=True,
                leave=False,
                smoothing=0.05,
            )
            logs = logging_redirect_tqdm([logging.getLogger("aoe_jax")])
            self._redirected.enter_context(logs)

    def status(self, status):
        """Shows what the run does, such as `training`."""
        if self.shows and status != self._status:
            if self._status == "compiling":
                self._bar.unpause()  # compilation does not count in the speed
            self._status = status
            self._bar.set_description_str(f"{status:<{_STATUS_WIDTH}}")

    def step(self, step, loss):
        """Shows a finished step, logged or not."""
        self._loss = f"loss {loss:.4f}"
        if self.shows:
            self._draw(step)

    def write(self, step, group, scalars, layers, experts):
        """Shows the speed, and means over layers: the load of each expert, the largest load over
        the mean load, and the entropy over its maximum.
        """
        if group != "train":
            return
        self._figures = f"{scalars['tokens_per_second']:,.0f} tokens/s"
        if layers:
            load = experts["load"].mean(axis=0)
            columns = f"{load_columns(load)} " if self._can_show(len(load)) else ""
            largest, entropy = layers["load_max_over_mean"].mean(), scalars["load_entropy"]
            best = max(np.log(layers.get("live_experts", len(load))).mean(), 1e-9)
            self._figures += f", load {columns}max {largest:.2f}x, entropy {entropy / best:.0%}"
        self._draw(step)

    def _can_show(self, n_experts):
        try:
            _COLUMNS.encode(sys.stderr.encoding or "ascii")
        except UnicodeEncodeError:
            return False
        return n_experts <= MAX_EXPERTS

    def _draw(self, step):
        self._bar.set_postfix_str(", ".join(filter(None, (self._loss, self._figures))), False)
        self._bar.update(step - self._bar.n)

    def close(self):
        """Erases the line; the log is written directly again."""
        with self._redirected:
            if self.shows:
                self._bar.close()

"""A trace of a few training steps: `--profile=STEP:N` of `train.py`, for TensorBoard's or XProf's
trace viewer.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from aoe_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The steps to trace: `n_steps`, from step `first` on."""

    first: int
    n_steps: int

    @property
    def last(self):
        """The last step traced."""
        return self.first + self.n_steps - 1

    @classmethod
    def parse(cls, text):
        """The window of a flag's value `STEP:N`.

        Raises:
          UserError: it has another form, or STEP or N is 0.
        """
        numbers = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
        window = cls(*map(int, numbers.groups())) if numbers else None
        if window is None or 0 in (window.first, window.n_steps):
            raise UserError(
                f"--profile={text}: must be STEP:N, N steps from step STEP on, such as 20:3; both from 1"
            )
        return window

    def of_run(self, start_step, total_steps):
        """The window of a run from `start_step` to `total_steps`: None, with a warning, where it
        goes on behind it.

        Raises:
          UserError: the run ends before.
        """
        if self.last > total_steps:
            raise UserError(
                f"--profile={self.first}:{self.n_steps}: this run takes the steps {start_step + 1} to {total_steps}; "
                "choose of these"
            )
        if self.first <= start_step:
            log.warning(
                "--profile=%d:%d: step %d is past; nothing is traced",
                self.first,
                self.n_steps,
                self.first,
            )
            return None
        return self


class Profile:
    """Traces the steps of a window into a folder; without a window, none."""

    def __init__(self, folder: Path, window: Window | None):
        """Where to, and which steps."""
        self._folder, self._window = folder, window

    def run(self, step, function, *args):
        """`function(*args)`, which is training step `step`.

        A trace begins when all before it is done, and ends when its last step is.
        """
        window = self._window
        if window is None or not window.first <= step <= window.last:
            return function(*args)
        if step == window.first:
            jax.block_until_ready(args)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a Python function would bury the step
            jax.profiler.start_trace(self._folder, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == window.last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            log.info("wrote a trace of steps %d to %d: %s", window.first, step, self._folder)
        return result

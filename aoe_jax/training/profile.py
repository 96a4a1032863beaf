"""`--profile=STEP:N` of `train.py`: a trace of N training steps, for TensorBoard or XProf."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from aoe_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The steps to trace."""

    first: int
    last: int

    @classmethod
    def parse(cls, text):
        """The window of a flag's value `STEP:N`; raises `UserError` if it has another form."""
        numbers = re.fullmatch(r"0*([1-9]\d*):0*([1-9]\d*)", text, re.ASCII)
        if not numbers:
            raise UserError(
                f"--profile={text}: must be STEP:N, N steps beginning with step STEP, such as "
                "20:3; both from 1"
            )
        first, n_steps = map(int, numbers.groups())
        return cls(first, first + n_steps - 1)

    def of_run(self, start_step, total_steps):
        """The window itself, or None, with a warning, if the run starts after its first step.

        Raises `UserError` if the run ends before the window does.
        """
        flag = f"--profile={self.first}:{self.last - self.first + 1}"
        if self.last > total_steps:
            raise UserError(
                f"{flag}: this run takes the steps {start_step + 1} to {total_steps}; "
                "choose some of these"
            )
        if self.first <= start_step:
            log.warning(f"{flag}: step {self.first} is past; nothing is traced")
            return None
        return self

    def run(self, step, folder: Path, function, *args):
        """Calls `function(*args)`, which is training step `step`, and traces it into `folder` if it
        is in the window.

        The first traced step waits for all steps before it, the last one until it is done.
        """
        if not self.first <= step <= self.last:
            return function(*args)
        if step == self.first:
            jax.block_until_ready(args)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would bury the step
            jax.profiler.start_trace(folder, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == self.last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            log.info(f"wrote a trace of steps {self.first} to {step}: {folder}")
        return result

"""`--profile=STEP:N` of `train.py`: writes a trace of N steps, for TensorBoard or XProf."""

import itertools
import logging
import re
from pathlib import Path

import jax

from aoe_jax.config.checks import require_flag

log = logging.getLogger(__name__)


def steps_to_trace(text, total_steps):
    """Parses the value `STEP:N` of the flag into a `range` of steps. Raises `UserError` for any
    other value, and if the run ends before the last of these steps.
    """
    numbers = re.fullmatch(r"0*([1-9]\d{0,8}):0*([1-9]\d{0,8})", text, re.ASCII)
    wanted = "must be STEP:N, such as 20:3 for 3 steps from step 20 on; both at least 1"
    require_flag(numbers, "profile", text, wanted)
    first, n_steps = map(int, numbers.groups())
    wanted = f"the run ends at step {total_steps}; choose steps up to that one"
    require_flag(first + n_steps - 1 <= total_steps, "profile", text, wanted)
    return range(first, first + n_steps)


def tracing(train_step, steps: range, folder: Path, next_step):
    """Returns a `train_step` that writes a trace of the training steps `steps` to `folder`. Its
    first call does step `next_step`. If `steps` begin earlier, `tracing` logs a warning, and the
    returned function traces nothing.

    The first traced call waits for all earlier steps, and the last one waits for its own result.
    """
    if steps[0] < next_step:
        log.warning(f"--profile: the run is past step {steps[0]}; nothing is traced")
        return train_step
    numbers = itertools.count(next_step)

    def traced_step(*args):
        step = next(numbers)
        if step not in steps:
            return train_step(*args)
        if step == steps[0]:
            jax.block_until_ready(args)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # thousands of Python calls would hide the step
            jax.profiler.start_trace(folder, profiler_options=options)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(*args)
        if step == steps[-1]:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            log.info(f"wrote a trace of steps {steps[0]} to {step}: {folder}")
        return result

    return traced_step

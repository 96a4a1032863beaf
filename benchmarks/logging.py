"""The cost of logging in a training step: `configs/tiny.py` on one core, with telemetry and
without, timed in turn.

`python -m benchmarks.logging [--repeats=40] [--json=FILE]`. A step is as in `training/loop.py`: it
is dispatched, then the figures of the step before are fetched, all of them if it is logged.
`without` logs nothing; `every 20` is the setting of the configuration, `every step` the worst case.
Tokens are random, files are temporary.

An arm's cost is the median, over repeats, of its difference to `without` in the same repeat: a step
with a line for `every step`, a twentieth of that for `every 20`. `norms` is the cost of the norms
of update and parameters, which every other arm computes: the difference to a step without them.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.step_times import random_batch
from aoe_jax.training.telemetry import Telemetry
from benchmarks.timing import configuration, machine_in_words, report, run_benchmark

_REPEATS = flags.DEFINE_integer("repeats", 40, "timed steps of each arm", lower_bound=3)

SMALL = ("loss", "grad_norm")  # fetched of every step


class Arm:
    """A training run that takes one step at a time."""

    def __init__(self, config, step, telemetry, logs):
        """Begins a run with a state of its own; `logs` says whether it writes a line a step."""
        self._state = jax.jit(lambda: init_state(config, 0))()
        self._batch = jax.device_put(random_batch(config))
        self._step, self._telemetry, self._logs, self._number = step, telemetry, logs, 0
        self._before = None

    def run(self):
        """Takes a step and reports the one before; seconds."""
        started = time.perf_counter()
        self._number += 1
        self._state, metrics = self._step(self._state, self._batch)
        if self._before and self._logs:
            self._telemetry.train(self._number - 1, jax.device_get(self._before))
        elif self._before:
            jax.device_get([self._before[name] for name in SMALL])
        self._before = metrics
        with self._telemetry.clock("input"):
            pass
        jax.block_until_ready(self._state)
        return time.perf_counter() - started


def without_norms(config):
    """The train step without the norms of update and parameters, which the compiler then leaves
    out.
    """
    step = make_train_step(config)

    def bare(state, batch):
        state, metrics = step(state, batch)
        return state, {k: v for k, v in metrics.items() if k not in ("update_norm", "param_norm")}

    return bare


def main():
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(machine_in_words())
    config = configuration("aoe")
    programs = {"all": make_train_step(config), "bare": without_norms(config)}
    state, batch = jax.jit(lambda: init_state(config, 0))(), random_batch(config)
    steps = {
        name: jax.jit(f, donate_argnums=0).lower(state, batch).compile()
        for name, f in programs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(Path(folder), config, 0)
        silent = Telemetry(Path(folder), config, 0, writes=False)
        telemetry.start(state, steps["all"])
        arms = {
            "without": Arm(config, steps["all"], silent, False),
            "every step": Arm(config, steps["all"], telemetry, True),
            "without norms": Arm(config, steps["bare"], silent, False),
        }
        for arm in arms.values():
            arm.run(), arm.run()
        seconds = {name: [] for name in arms}
        for _ in range(_REPEATS.value):
            for name, arm in arms.items():
                seconds[name].append(arm.run())
        telemetry.close()

    def difference(name, base):
        return statistics.median(a - b for a, b in zip(seconds[name], seconds[base], strict=True))

    step, line = statistics.median(seconds["without"]), difference("every step", "without")
    costs = {
        "every step": line,
        f"every {config.train.log_every}": line / config.train.log_every,
        "norms": difference("without", "without norms"),
    }
    print(f"a step takes {1e3 * step:.1f} ms")
    for name, cost in costs.items():
        print(f"{name:>12}: {1e3 * cost:6.2f} ms a step, {100 * cost / step:5.2f}%")
    figures = [
        {"arm": name, "ms": 1e3 * cost, "step_ms": 1e3 * step, "share": cost / step}
        for name, cost in costs.items()
    ]
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)

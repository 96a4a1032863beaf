"""A training step of configs/tiny.py beside that of an earlier commit.

`python -m benchmarks.earlier --commit=REVISION [--variants=aoe,moe] [--rounds=5] [--steps=20]
[--json=FILE]`. In each round the step of either commit is compiled and repeated in a process of its
own, one after the other. Ratios are this code over the earlier one. The ratio of times is the
median of the rounds; those of FLOPs and bytes accessed are of the compiled programs, without noise.
Uncommitted changes belong to this code. The earlier commit must have `RepeatedStep`.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from absl import flags

from aoe_jax.errors import UserError
from benchmarks.timing import configuration, machine_in_words, report, run_benchmark

_COMMIT = flags.DEFINE_string("commit", None, "what `git` calls the earlier commit")
_VARIANTS = flags.DEFINE_list("variants", ["aoe", "moe"], "of configs/tiny.py")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "processes of each commit and variant", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "timed steps of a process", lower_bound=1)

ROOT = Path(__file__).parents[1]
# Runs in either source tree, so it uses only what both have.
TIMING = """
import json, statistics, sys, time
import jax
from aoe_jax.training.step_times import RepeatedStep
from aoe_jax.config.run import Config
from configs import tiny

step, seconds = RepeatedStep(Config.from_config_dict(tiny.get_config(sys.argv[1]))), []
for _ in range(int(sys.argv[2]) + 1):
    start = time.perf_counter()
    jax.block_until_ready(step())
    seconds.append(time.perf_counter() - start)
cost = step.program.cost_analysis()
figures = {"seconds": statistics.median(seconds[1:]), "flops": cost["flops"]}
print(json.dumps(figures | {"bytes": cost["bytes accessed"]}))
"""


def extract(commit, folder):
    """Writes the source tree of a commit of this repository into a folder."""
    command = ["git", "-C", str(ROOT), "archive", commit]
    found = subprocess.run(command, capture_output=True)
    if found.returncode:
        raise UserError(f"--commit={commit}: {found.stderr.decode().strip().splitlines()[-1]}")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")


def measured(tree, variant, steps):
    """Median seconds, FLOPs and bytes accessed of a training step by the code of a source tree."""
    done = subprocess.run(
        [sys.executable, "-c", TIMING, variant, str(steps)],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"a step of {variant} in {tree} fails: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if _COMMIT.value is None:
        raise UserError("--commit is missing")
    for variant in _VARIANTS.value:
        configuration(variant)  # reports a mistake before the measurements
    print(machine_in_words())
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        extract(_COMMIT.value, folder)
        for variant in _VARIANTS.value:
            ratios = []
            for number in range(_ROUNDS.value):
                trees = (folder, ROOT) if number % 2 else (ROOT, folder)
                found = {tree: measured(tree, variant, _STEPS.value) for tree in trees}
                earlier, now = found[folder], found[ROOT]
                ratios.append({name: now[name] / earlier[name] for name in now})
                milliseconds = f"{1e3 * earlier['seconds']:.0f}, now {1e3 * now['seconds']:.0f} ms"
                print(f"{variant}: {milliseconds}", flush=True)
            times = sorted(ratio["seconds"] for ratio in ratios)
            figure = {"variant": variant, **ratios[-1], "seconds": statistics.median(times)}
            figures.append(figure | {"all_seconds": times})
            print(
                f"{variant}, ratios: time {figure['seconds']:.3f} ({times[0]:.3f} to "
                f"{times[-1]:.3f}), FLOPs {figure['flops']:.4f}, bytes {figure['bytes']:.4f}",
                flush=True,
            )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)

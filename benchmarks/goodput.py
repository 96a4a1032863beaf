"""The goodput of a run that is preempted again and again: the share of its time that computed steps
which were not lost later.

`python -m benchmarks.goodput --workdir=DIR [--minutes=10] [--preemptions=5] [--pod_size=1]
[--json=FILE]` trains a small model under `aoe_jax.supervise`, sends SIGTERM to all training
processes at even distances, and reads `goodput` of the last line of `metrics.jsonl`. Compilation,
saves, validation and the time from a request to stop to the first step after it take the rest.
"""

import os
import random
import signal
import time
from pathlib import Path

from absl import flags

from aoe_jax.storage.files import read_metrics
from benchmarks.pod_soak import Pod
from benchmarks.soak import Soak
from benchmarks.timing import machine_in_words, new_workdir, report, run_benchmark

SETTINGS = {
    "train.steps": 1_000_000,
    "train.eval_every": 0,
    "train.log_every": 20,
    "checkpoint.every": 1000,
}


def measure(root: Path, seconds, preemptions, processes):
    """Trains for so many seconds; returns the goodput and what it consists of."""
    work = Soak(root, SETTINGS)
    pod, began = Pod(work, root / "run", processes, root), time.monotonic()
    try:
        for number in range(1, preemptions + 1):
            time.sleep(max(began + number * seconds / (preemptions + 1) - time.monotonic(), 0))
            pod.has_ended()
            pod.send(signal.SIGTERM, everyone=True, chance=random)
        time.sleep(max(began + seconds - time.monotonic(), 0))
        pod.stop()
    finally:
        pod.end()
    lines = [line for line in read_metrics(root / "run" / "metrics.jsonl") if "loss" in line]
    names = ("compute_seconds", "input_seconds", "checkpoint_seconds")
    return {
        "processes": processes,
        "preemptions": preemptions,
        "seconds": time.monotonic() - began,
        "steps": lines[-1]["step"],
        "goodput": lines[-1]["goodput"],
        **{name: sum(line[name] for line in lines) for name in names},
    }


def main():
    root = new_workdir(flags.FLAGS["workdir"])
    given = flags.FLAGS
    figures = measure(root, 60 * given.minutes, given.preemptions, given.pod_size)
    print(
        f"goodput {figures['goodput']:.2f} over {figures['seconds']:.0f} s with "
        f"{figures['preemptions']} preemptions of {figures['processes']} process(es), "
        f"{figures['steps']} steps ({machine_in_words()})"
    )
    report(figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    flags.DEFINE_string("workdir", None, "a directory for the run")
    flags.DEFINE_float("minutes", 10.0, "how long the run lasts", lower_bound=0.1)
    flags.DEFINE_integer("preemptions", 5, "how often it is preempted", lower_bound=0)
    flags.DEFINE_integer("pod_size", 1, "processes of the run", lower_bound=1)
    run_benchmark(main)

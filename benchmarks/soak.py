"""A soak test: real training processes that are killed at random moments must end in the same state
as one that is not.

`python -m benchmarks.soak --workdir=DIR [--kills=50] [--terms=20] [--seed=0] [--json=FILE]`: first
a small model is trained without a break. Then the same run is started over and over, and killed
(SIGKILL) or asked to stop (SIGTERM) right after its start, while its data is prepared, in its
steps, or while it saves. When the run reaches its end, it is compared with the first, bit for bit:
the metrics, every line of metrics.jsonl except its timing, the position in the data and the
fingerprints of all arrays of the last checkpoint. Then the next run begins. After every stop each
complete checkpoint is read whole. The program fails at the first difference, unreadable checkpoint
or wrong exit status.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from aoe_jax.data.sotu import speech_files
from aoe_jax.errors import Failure, Terminated
from aoe_jax.training.telemetry import MEASURED
from benchmarks.timing import new_workdir, report, run_benchmark

SETTINGS = {
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.d_model": 64,
    "model.vocab_size": 1024,
    "model.unroll": 1,
    "experts.d_ffn": 64,
    "experts.d_low": 16,
    "balance.bias_rate": 0.01,
    "data.name": "text",
    "data.seq_len": 64,
    "train.steps": 120,
    "train.batch_size": 8,
    "train.log_every": 3,
    "train.eval_every": 40,
    "checkpoint.every": 7,
    "checkpoint.keep": 3,
}
# moment of a stop -> the most seconds from it to the signal
MOMENTS = {"start": 6, "preparation": 1, "steps": 4, "save": 0.05}
PATIENCE = 300  # seconds of waiting for a moment, before that counts as a failure


class Soak:
    """One run after the other in `root`, all with the same texts."""

    def __init__(self, root: Path, settings):
        """Writes the texts, the addresses of a few decades, one document each. `settings` are
        fields of the configuration beside `SETTINGS`.
        """
        self._settings = SETTINGS | settings
        self._root, self.texts, self.cache = root, root / "texts", root / "cache"
        self.texts.mkdir(parents=True)
        for file in speech_files()[-40:]:
            shutil.copyfile(file, self.texts / file.name)

    cwd = Path(__file__).parents[1]

    @property
    def environment(self):
        """The variables of a training program."""
        return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self._root / "compiled")}

    def command(self, workdir):
        """The arguments of Python that train, or continue a run that has begun."""
        settings = self._settings | {"data.path": self.texts, "data.cache": self.cache}
        fields = [f"--config.{name}={value}" for name, value in settings.items()]
        return ["train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *fields]

    def start(self, workdir):
        return subprocess.Popen(
            [sys.executable, *self.command(workdir)],
            cwd=self.cwd,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, workdir):
        """Trains a run to its end; returns its workdir."""
        process = self.start(workdir)
        _, stderr = process.communicate()
        if process.returncode:
            status = process.returncode
            raise Failure(f"{workdir} ended with exit status {status}:\n{stderr[-2000:]}")
        return workdir

    def attempt(self, workdir, moment, number, chance):
        """Starts the run and stops it at `moment` by a signal, unless it ends before; returns
        `(exit status, stderr)`.
        """
        if moment == "preparation":
            shutil.rmtree(self.cache / "tokens", ignore_errors=True)
        known, saves = set(_names(workdir / "checkpoints")), chance.randrange(4)
        process = self.start(workdir)
        reached = {
            "start": lambda: True,
            "preparation": lambda: any(
                ".partial" in name for name in _names(self.cache / "tokens")
            ),
            "steps": lambda: (
                read_heartbeat(workdir).get("pid") == process.pid
                and read_heartbeat(workdir)["status"] in ("training", "validating")
            ),
            "save": lambda: self._saving(workdir, known, saves),
        }[moment]
        deadline = time.monotonic() + PATIENCE
        while not reached() and process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise Failure(f"{moment} did not come within {PATIENCE} s")
            time.sleep(0.001)
        time.sleep(MOMENTS[moment] * chance.random())
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
        return process.returncode, stderr

    @staticmethod
    def _saving(workdir, known, saves):
        """Whether a checkpoint is being written, after `saves` others."""
        new = set(_names(workdir / "checkpoints")) - known
        return sum(name.isdecimal() for name in new) >= saves and any("tmp" in name for name in new)


def _names(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def read_heartbeat(workdir):
    """The content of `heartbeat.json`, empty if it cannot be read."""
    with contextlib.suppress(Exception):  # each client of a store has exceptions of its own
        return json.loads((workdir / "heartbeat.json").read_text())
    return {}


def check_checkpoints(workdir):
    """Reads every checkpoint that the run keeps; raises `Failure` if one is damaged."""
    if (workdir / "damaged_checkpoints").exists():
        raise Failure(f"{workdir} has damaged checkpoints")
    if not (workdir / "checkpoints").is_dir():
        return
    import jax

    from aoe_jax.sharding import with_shardings
    from aoe_jax.storage.config_files import read_run_config
    from aoe_jax.training.checkpoint import Checkpoints
    from aoe_jax.training.step import init_state

    config = read_run_config(workdir / "config.json")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.eval_shape(lambda: init_state(config, 0))
    state = with_shardings(state, jax.tree.map(lambda a: here, state))
    checkpoints = Checkpoints(workdir)
    # A kill while an older checkpoint is being deleted leaves a part of it.
    for step in checkpoints.steps()[-config.checkpoint.keep :]:
        try:
            checkpoints.restore(step, state)
        except Exception as e:
            raise Failure(f"checkpoint of step {step} of {workdir} cannot be read: {e}") from e


def result(workdir):
    """Everything that is equal in two runs that computed the same."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    untimed = [
        {name: value for name, value in line.items() if not name.endswith(MEASURED)}
        for line in lines
    ]
    metrics = json.loads((workdir / "summary.json").read_text())["metrics"]
    beside = json.loads(
        (workdir / "checkpoints" / str(metrics["step"]) / "run" / "metadata").read_text()
    )
    # A run that is stopped before its last validation saves first, and validates when continued.
    del beside["progress"]["validated"], beside["sha256"]
    return metrics, untimed, beside


def soak(root: Path, kills, terms, seed, settings=None):
    """Stops runs by SIGKILL `kills` times and by SIGTERM `terms` times; `seed` decides the order
    and the moments. Returns what happened. Raises `Failure` at the first difference, unreadable
    checkpoint or wrong exit status.
    """
    chance, work = random.Random(seed), Soak(root, settings or {})
    wanted = result(work.finish(root / "whole"))
    stops = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    chance.shuffle(stops)
    happened, finished, run = collections.Counter(), 0, root / "run_0"
    for number in tqdm(stops, desc="stops", unit="stop"):
        moment = chance.choice([*MOMENTS])
        status, stderr = work.attempt(run, moment, number, chance)
        # Before the run handles SIGTERM, it ends the process as it ends any program or command.
        at_once = -signal.SIGTERM, Terminated.status
        early = number == signal.SIGTERM and status in at_once and moment == "start"
        if status not in (0, -signal.SIGKILL) and not early:
            name = signal.Signals(number).name
            raise Failure(f"exit status {status} after {name} ({moment}):\n{stderr[-2000:]}")
        if "damaged" in stderr:
            raise Failure(f"a checkpoint was found damaged:\n{stderr[-2000:]}")
        happened[f"{signal.Signals(number).name} {moment}"] += 1
        check_checkpoints(run)
        if (run / "summary.json").exists():
            compare(run, wanted)
            finished, run = finished + 1, root / f"run_{finished + 1}"
    compare(work.finish(run), wanted)
    check_checkpoints(run)
    return {
        "kills": kills,
        "terms": terms,
        "runs_finished": finished + 1,
        "stops": dict(sorted(happened.items())),
    }


def compare(run, wanted):
    """Raises `Failure` unless the `result` of a run is the wanted one."""
    for name, found, whole in zip(
        ("metrics", "lines of metrics.jsonl", "last checkpoint"), result(run), wanted, strict=True
    ):
        if found != whole:
            raise Failure(f"{name} of {run} differ from those of the run without a break")


def main():
    root = new_workdir(flags.FLAGS["workdir"])
    figures = soak(root, flags.FLAGS.kills, flags.FLAGS.terms, flags.FLAGS.seed)
    print(
        f"{figures['kills']} kills and {figures['terms']} requests to stop over "
        f"{figures['runs_finished']} run(s): all ended bit for bit as the run without a break, and "
        "every checkpoint could be read"
    )
    for what, count in figures["stops"].items():
        print(f"{count:4d}  {what}")
    report(figures)


if __name__ == "__main__":  # only here, so that others can import this
    flags.DEFINE_string("workdir", None, "a directory for the runs")
    flags.DEFINE_integer("kills", 50, "how often a process is killed", lower_bound=0)
    flags.DEFINE_integer("terms", 20, "how often a process is asked to stop", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the moments")
    run_benchmark(main)

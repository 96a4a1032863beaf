"""A soak test: training runs that are killed, stopped or paused at random moments must end in the
same state as an undisturbed run, bit for bit.

    python -m benchmarks.soak --workdir=DIR [--kills=50] [--terms=20]
    python -m benchmarks.soak --workdir=DIR --pod_size=2 [--events=20]

The first form trains a small model in one process without a break. Then it starts the same run many
times, and kills it (SIGKILL) or asks it to stop (SIGTERM) right after its start, during data
preparation, during its steps, or during a save. The second form trains with several processes, each
under `aoe_jax.supervise`. It sends SIGKILL or SIGTERM to one or all of the processes, or pauses one
(SIGSTOP) for longer than `train.hang_timeout`. The supervisors must bring the run to its end.

A run that reaches its end is compared with the undisturbed one: the metrics, every line of
metrics.jsonl except measured times, and the arrays of the last checkpoint. In the first form every
kept checkpoint is also read after each stop. The program fails at the first difference, unreadable
checkpoint or wrong exit status, or if a supervisor gives up. `--seed` decides the order and the
moments of the signals.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import psutil
from absl import flags
from tqdm import tqdm

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.data.corpora import speech_files
from aoe_jax.errors import Failure, Terminated
from aoe_jax.sharding import with_shardings
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.metrics import MEASURED
from aoe_jax.training.step import init_state
from benchmarks.timing import report, run_benchmark

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
# The moment of a stop -> the longest delay of the signal after this moment, in seconds.
MOMENTS = {"start": 6, "preparation": 1, "steps": 4, "save": 0.05}
HANG_TIMEOUT = 30  # seconds; on a busy machine a restore alone may take half of it
LONGEST = 20  # longest pause before an event of a supervised run, in seconds
PATIENCE = 900  # seconds to wait before a missing event counts as a failure
ROOT = Path(__file__).parents[1]


class Soak:
    """Starts runs of one configuration, all in the folder `root` and on the same texts."""

    def __init__(self, root: Path, settings):
        """Copies 40 texts of the embedded corpus into `root`; `settings` override `SETTINGS`."""
        self.root, self.cache, texts = root, root / "cache", root / "texts"
        texts.mkdir(parents=True)
        for file in speech_files()[-40:]:
            shutil.copyfile(file, texts / file.name)
        data = {"data.path": texts, "data.cache": self.cache}
        fields = (SETTINGS | settings | data).items()
        self._fields = [f"--config.{name}={value}" for name, value in fields]

    def start(self, workdir, *more, supervisor=()):
        """Starts training in a process whose output goes to the file `WORKDIR.log`."""
        command = ["train.py", "--config=configs/tiny.py:published", f"--workdir={workdir}"]
        command += self._fields
        log = workdir.with_name(f"{workdir.name}.log")
        with log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, *supervisor, *command, *more],
                cwd=ROOT,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled")},
                stderr=output,
            )

    def finish(self, workdir):
        """Trains a run to its end."""
        if status := self.start(workdir).wait():
            raise Failure(f"{workdir} ended with exit status {status}:\n{last_words(workdir)}")

    def stop(self, workdir, moment, number, chance):
        """Starts a run and sends it the signal `number` at `moment`; returns the exit status."""
        if moment == "preparation":
            shutil.rmtree(self.cache / "tokens", ignore_errors=True)
        known, n_saves = set(_names(workdir / "checkpoints")), chance.randrange(4)
        process = self.start(workdir)
        reached = {
            "start": lambda: True,
            "preparation": lambda: any(".partial" in n for n in _names(self.cache / "tokens")),
            "steps": lambda: _computes(read_heartbeat(workdir), process.pid),
            "save": lambda: _is_saving(workdir, known, n_saves),
        }[moment]
        wait_until(lambda: reached() or process.poll() is not None, moment, workdir)
        time.sleep(MOMENTS[moment] * chance.random())
        process.send_signal(number)
        return process.wait(PATIENCE)


def last_words(workdir):
    """Returns the last 2,000 characters of each log of a run."""
    logs = sorted(workdir.parent.glob(f"{workdir.name}*.log"))
    return "\n".join(log.read_text()[-2000:] for log in logs)


def wait_until(holds, name, workdir):
    """Waits until `holds()` is true; raises `Failure` after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Failure(f"{name} was not reached within {PATIENCE} s:\n{last_words(workdir)}")
        time.sleep(0.005)


def _names(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _is_saving(workdir, known, n_saves):
    """Whether a checkpoint is being written and `n_saves` others, not in `known`, are complete."""
    new = set(_names(workdir / "checkpoints")) - known
    return sum(name.isdecimal() for name in new) >= n_saves and any("tmp" in name for name in new)


def _computes(heartbeat, pid):
    is_own = heartbeat.get("pid") == pid
    return is_own and heartbeat.get("status") in ("training", "validating")


def read_heartbeat(workdir):
    """Returns the content of `heartbeat.json`, empty if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((workdir / "heartbeat.json").read_text())
    return {}


def read_state(workdir, step):
    """Restores the checkpoint of a step; returns a hash of its arrays.

    Raises `Failure` if the checkpoint cannot be read.
    """
    config = read_run_config(workdir / "config.json")
    here = jax.sharding.make_single_device_sharding(jax.devices()[0])
    like = jax.eval_shape(lambda: init_state(config, 0))
    like = with_shardings(like, jax.tree.map(lambda a: here, like))
    try:
        state, _ = Checkpoints(workdir).restore(step, like)
    except Exception as e:
        raise Failure(f"checkpoint of step {step} of {workdir} cannot be read: {e}") from e
    digest = hashlib.sha256()
    for array in jax.tree.leaves(jax.device_get(state)):
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_checkpoints(workdir):
    """Reads every checkpoint that the run keeps; raises `Failure` if one is damaged."""
    if (workdir / "damaged_checkpoints").exists():
        raise Failure(f"{workdir} has damaged checkpoints")
    if (workdir / "checkpoints").is_dir():
        keep = read_run_config(workdir / "config.json").checkpoint.keep
        # Older checkpoints are not read, because a kill may interrupt their deletion.
        for step in Checkpoints(workdir).steps()[-keep:]:
            read_state(workdir, step)


def result(workdir):
    """Returns `{name: value}` of everything that must be equal in two runs."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((workdir / "summary.json").read_text())["metrics"]
    return {
        "metrics": metrics,
        "lines of metrics.jsonl": [
            {name: value for name, value in line.items() if not name.endswith(MEASURED)}
            for line in lines
        ],
        "last checkpoint": read_state(workdir, metrics["step"]),
    }


def compare(workdir, wanted):
    """Raises `Failure` if the `result` of a run differs from `wanted`."""
    for name, found in result(workdir).items():
        if found != wanted[name]:
            raise Failure(f"{name} of {workdir} differ from those of the run without a break")


def soak(root: Path, kills, terms, seed, settings=None):
    """Stops runs by SIGKILL `kills` times and by SIGTERM `terms` times; counts runs and stops.

    Raises `Failure` at the first difference, unreadable checkpoint or wrong exit status.
    """
    chance, work = random.Random(seed), Soak(root, settings or {})
    work.finish(root / "whole")
    wanted = result(root / "whole")
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    chance.shuffle(signals)
    happened, n_finished, run = collections.Counter(), 0, root / "run_0"
    for number in tqdm(signals, desc="stops", unit="stop"):
        moment = chance.choice([*MOMENTS])
        status = work.stop(run, moment, number, chance)
        # A SIGTERM that comes before the run has installed its handler ends the process.
        early = number == signal.SIGTERM and moment == "start"
        allowed = {0, -signal.SIGKILL} | ({-signal.SIGTERM, Terminated.status} if early else set())
        if status not in allowed:
            what = f"exit status {status} after {number.name} ({moment})"
            raise Failure(f"{what}:\n{last_words(run)}")
        happened[f"{number.name} {moment}"] += 1
        check_checkpoints(run)
        if (run / "summary.json").exists():
            compare(run, wanted)
            n_finished, run = n_finished + 1, root / f"run_{n_finished + 1}"
    work.finish(run)
    compare(run, wanted)
    return {"processes": 1, "runs_finished": n_finished + 1, "events": dict(happened)}


class SupervisedRun:
    """A run of several processes on this machine, each under a supervisor."""

    def __init__(self, work: Soak, workdir, n_processes):
        """Starts the supervisors."""
        self.workdir = workdir
        supervisor = ["-m", "aoe_jax.supervise", "--pause=1", "--restarts=20", "--"]
        more = [f"--coordinator=localhost:{_free_port()}", f"--processes={n_processes}"]
        more += ["--retry_seconds=5"]
        self._supervisors = [
            work.start(workdir, *more, f"--process={i}", supervisor=supervisor)
            for i in range(n_processes)
        ]

    def has_ended(self):
        """Whether all supervisors have ended; raises `Failure` if one of them gave up."""
        statuses = [supervisor.poll() for supervisor in self._supervisors]
        if any(statuses):
            raise Failure(f"supervisors ended with {statuses}:\n{last_words(self.workdir)}")
        return None not in statuses

    def _trainers(self):
        for supervisor in self._supervisors:
            with contextlib.suppress(psutil.Error):
                yield from psutil.Process(supervisor.pid).children()

    def wait_for_steps(self):
        """Waits until a new heartbeat says that the run computes steps, or until the run ends."""
        before = read_heartbeat(self.workdir)

        def computes():
            now = read_heartbeat(self.workdir)
            return now != before and now.get("status") == "training"

        wait_until(lambda: self.has_ended() or computes(), "a step", self.workdir)

    def wait(self):
        """Waits for the end of the run."""
        wait_until(self.has_ended, "the end", self.workdir)

    def send(self, number, everyone, chance):
        """Sends a signal to one or all training processes; after SIGSTOP, resumes them later."""
        trainers = [*self._trainers()]
        if trainers and not everyone:
            trainers = [chance.choice(trainers)]
        for trainer in trainers:
            with contextlib.suppress(psutil.Error):
                trainer.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(HANG_TIMEOUT + 10)
            for trainer in trainers:
                with contextlib.suppress(psutil.Error):
                    trainer.resume()

    def kill(self):
        """Kills the processes and their supervisors."""
        for process in [*self._trainers(), *self._supervisors]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _free_port():
    """Finds a free port outside the range from which the system gives ports to other programs."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise Failure("no port is free")


def soak_supervised(root: Path, n_processes, n_events, seed, settings=None):
    """Disturbs supervised runs `n_events` times; returns counts of the events.

    Raises `Failure` if a run ends in another state than the undisturbed run, or does not end.
    """
    chance = random.Random(seed)
    work = Soak(root, {"train.hang_timeout": HANG_TIMEOUT} | (settings or {}))
    one, all_ = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), (signal.SIGKILL, signal.SIGTERM)
    choices = [(number, False) for number in one] + [(number, True) for number in all_]
    happened, n_finished = collections.Counter(), 0
    run = SupervisedRun(work, root / "whole", n_processes)
    try:
        run.wait()
        wanted = result(run.workdir)
        run = SupervisedRun(work, root / "run_0", n_processes)
        for _ in tqdm(range(n_events), desc="events", unit="event"):
            if chance.random() < 0.5:  # half of the events come during steps or saves
                run.wait_for_steps()
            time.sleep(LONGEST * chance.random())
            if run.has_ended():
                compare(run.workdir, wanted)
                n_finished += 1
                run = SupervisedRun(work, root / f"run_{n_finished}", n_processes)
                run.wait_for_steps()
            number, everyone = chance.choice(choices)
            run.send(number, everyone, chance)
            happened[f"{number.name} to {'all' if everyone else 'one'}"] += 1
        run.wait()
    finally:
        run.kill()
    compare(run.workdir, wanted)
    check_checkpoints(run.workdir)
    counts = {"processes": n_processes, "runs_finished": n_finished + 1}
    return counts | {"events": dict(happened)}


def main():
    given = flags.FLAGS
    root = cli.path_of(given["workdir"]).absolute()
    require_flag(not root.exists(), "workdir", root, "exists already; name a new directory")
    if given.pod_size == 1:
        figures = soak(root, given.kills, given.terms, given.seed)
    else:
        figures = soak_supervised(root, given.pod_size, given.events, given.seed)
    print(
        f"{sum(figures['events'].values())} events over {figures['runs_finished']} run(s) of "
        f"{figures['processes']} process(es): all ended bit for bit as the run without a break"
    )
    for what, count in sorted(figures["events"].items()):
        print(f"{count:4d}  {what}")
    report(figures)


if __name__ == "__main__":  # defined here, because tests import this file
    flags.DEFINE_string("workdir", None, "a directory for the runs")
    flags.DEFINE_integer("kills", 50, "how often a process is killed", lower_bound=0)
    flags.DEFINE_integer("terms", 20, "how often a process is asked to stop", lower_bound=0)
    flags.DEFINE_integer("pod_size", 1, "processes of a run; more than 1 are supervised", 1)
    flags.DEFINE_integer("events", 20, "how often several processes are disturbed", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "decides the order and the moments of the signals")
    run_benchmark(main)

"""Two trainers on one folder: exactly one trains, whenever they start.

`python -m benchmarks.two_owners --workdir=DIR [--tries=50] [--seed=0] [--json=FILE]` starts the
same run twice, at once or up to three seconds apart, with separate host names, process numbers and
mounts of the folder (`unshare`, which needs root). In every second try the folder is that of a
trainer on a third host that was killed, so both wait until its ownership is stale, and then take it
over. One of the two must be refused with exit status 5, and the other must train until it is asked
to stop. The program fails at the first try with another outcome.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from absl import flags
from tqdm import tqdm

from aoe_jax.errors import InUse, UserError
from aoe_jax.storage.files import read_metrics
from aoe_jax.storage.lease import read_owner
from benchmarks.soak import Failure, Soak, read_heartbeat
from benchmarks.timing import new_workdir, report, run_benchmark
from tests.hasty import xla_flags

LONGEST_OFFSET = 3.0  # seconds
PATIENCE = 600  # seconds
SETTINGS = {"train.steps": 1_000_000, "checkpoint.every": 20}


def on_a_host(name: str, disk: Path, mount: Path, command) -> list:
    """The command line of a program on a host of this name, where `disk` is mounted as `mount`."""
    mount.mkdir(exist_ok=True)
    inside = f'hostname {name}; mount --bind {disk} {mount}; exec "$@"'
    unshare = ["unshare", "--pid", "--fork", "--uts", "--mount", "--mount-proc"]
    return [*unshare, "sh", "-c", inside, "sh", *map(str, command)]


class Trainer:
    """A training process on a host of its own."""

    def __init__(self, work: Soak, host: str, disk: Path):
        """Starts training in the folder `disk`."""
        self._log, mount = disk.with_name(f"{disk.name}_{host}.log"), disk.with_name(host)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                on_a_host(host, disk, mount, [sys.executable, *work.command(mount / "run")]),
                cwd=work.cwd,
                env=work.environment,
                stderr=log,
            )

    def status(self):
        """The exit status, None while the process runs."""
        return self._process.poll()

    def words(self):
        """The output of the process so far."""
        return self._log.read_text()[-2000:]

    def end(self, number):
        """Sends a signal to the process itself; returns its exit status."""
        for child in psutil.Process(self._process.pid).children():
            child.send_signal(number)
        return self._process.wait(PATIENCE)


def _wait(what, holds):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Failure(f"{what} did not come within {PATIENCE} s")
        time.sleep(0.1)


def _saved(disk):
    """The step of the newest checkpoint, 0 if there is none."""
    return read_heartbeat(disk / "run").get("saved") or 0


def left_behind(work, disk: Path):
    """Makes a folder with the run of a trainer that was killed."""
    disk.mkdir()
    trainer = Trainer(work, "c", disk)
    _wait("a checkpoint", lambda: _saved(disk) > 0)
    trainer.end(signal.SIGKILL)
    (file,) = (disk / "run").glob("owner_[0-9]*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kernel": "of another machine"}))
    return disk


def attempt(work, disk: Path, offset):
    """Starts two trainers `offset` seconds apart; returns the host that trains. Raises `Failure` if
    both train, or none.
    """
    trainers = {}
    for host in ("a", "b"):
        trainers[host] = Trainer(work, host, disk)
        time.sleep(offset if host == "a" else 0)

    def words():
        return "\n".join(trainer.words() for trainer in trainers.values())

    try:
        _wait("the end of one", lambda: any(t.status() is not None for t in trainers.values()))
        (refused,) = (host for host, t in trainers.items() if t.status() is not None)
        (winner,) = trainers.keys() - {refused}
        if trainers[refused].status() != InUse.status or (
            f"is in use by process 1 on {winner}" not in trainers[refused].words()
        ):
            raise Failure(f"{refused} was not refused:\n{words()}")
        step = _saved(disk)
        _wait("a later checkpoint", lambda: _saved(disk) > step)
        if trainers[winner].end(signal.SIGTERM) != 0:
            raise Failure(f"{winner} did not save:\n{words()}")
    finally:
        for trainer in trainers.values():
            if trainer.status() is None:
                trainer.end(signal.SIGKILL)
    lines = read_metrics(disk / "run" / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    if read_owner(disk / "run") is not None or steps != sorted({*steps}):
        raise Failure(f"{disk} has an owner, or lines of two runs:\n{words()}")
    return winner


def race(root: Path, tries, seed):
    """Lets two trainers start in one folder so many times; returns how often each was the owner."""
    chance, work = random.Random(seed), Soak(root, SETTINGS)
    left = left_behind(work, root / "left") if tries > 1 else None
    winners = {"fresh": [], "taken over": []}
    for number in tqdm(range(tries), desc="tries", unit="try"):
        disk, stale = root / f"disk_{number}", number % 2 == 1
        if stale:
            shutil.copytree(left, disk)
        else:
            disk.mkdir()
        offset = chance.choice([0, chance.random()]) * LONGEST_OFFSET
        winner = attempt(work, disk, offset)
        winners["taken over" if stale else "fresh"].append(winner)
    return {
        kind: {host: hosts.count(host) for host in ("a", "b")} for kind, hosts in winners.items()
    }


def main():
    root = new_workdir(flags.FLAGS["workdir"])
    if os.geteuid() != 0 or not shutil.which("unshare"):
        raise UserError("two hosts on one machine need root and the program unshare")
    figures = race(root, flags.FLAGS.tries, flags.FLAGS.seed)
    for kind, counts in figures.items():
        total = sum(counts.values())
        print(f"{total} tries, folder {kind}: exactly one trained, the first {counts['a']} times")
    report(figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", xla_flags())
    flags.DEFINE_string("workdir", None, "a directory for the runs")
    flags.DEFINE_integer("tries", 50, "how often two trainers start", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the moments of their starts")
    run_benchmark(main)

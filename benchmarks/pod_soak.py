"""A soak test of several processes: whatever happens to them, their supervisors bring the run to
the same end, without a person.

`python -m benchmarks.pod_soak --workdir=DIR [--pod_size=2] [--events=20] [--seed=0] [--json=FILE]`:
first the processes train a small model without a disturbance. Then the same run is started over and
over under `aoe_jax.supervise`, one supervisor for each process, and disturbed at random moments:
SIGKILL or SIGTERM to one training process or to all of them, or SIGSTOP to one for longer than
`train.hang_timeout`. A run that reaches its end is compared with the first, bit for bit, as in
`benchmarks.soak`. The program fails at the first difference, or when a supervisor gives up.
"""

import collections
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from absl import flags
from tqdm import tqdm

from aoe_jax import cli
from aoe_jax.errors import UserError
from benchmarks.stopped_runs import (
    Failure,
    Soak,
    check_checkpoints,
    compare,
    read_heartbeat,
    result,
)
from benchmarks.timing import report

HANG_TIMEOUT = 15  # seconds
EVENTS = {  # the signal, and whether all processes receive it
    "SIGKILL to one": (signal.SIGKILL, False),
    "SIGKILL to all": (signal.SIGKILL, True),
    "SIGTERM to one": (signal.SIGTERM, False),
    "SIGTERM to all": (signal.SIGTERM, True),
    "SIGSTOP to one": (signal.SIGSTOP, False),
}
LONGEST = 20  # seconds from an event to the next
PATIENCE = 900  # seconds from the last event to the end of a run


class Pod:
    """The supervised processes of one run."""

    def __init__(self, work: Soak, workdir: Path, processes: int):
        """Starts the supervisors; what they and their processes say goes to files."""
        self.workdir = workdir
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
        flags += ["--join_timeout=120", "--retry_seconds=5"]
        own = [sys.executable, "-m", "aoe_jax.supervise", "--pause=1", "--restarts=20", "--"]
        self._logs = [workdir.with_name(f"{workdir.name}_{i}.log") for i in range(processes)]
        self._supervisors = []
        for i, log in enumerate(self._logs):
            command = [*own, *work.command(workdir), *flags, f"--process={i}"]
            with log.open("w") as file:
                self._supervisors.append(
                    subprocess.Popen(command, cwd=work.cwd, env=work.environment, stderr=file)
                )

    def has_ended(self):
        """Whether all supervisors have ended.

        Raises:
          Failure: one of them gave up.
        """
        statuses = [supervisor.poll() for supervisor in self._supervisors]
        if any(status for status in statuses if status is not None):
            words = "\n".join(log.read_text()[-2000:] for log in self._logs)
            self.end()
            raise Failure(f"supervisors ended with {statuses}:\n{words}")
        return None not in statuses

    def wait_for_steps(self):
        """Waits until steps are computed after the last event, or the run has ended."""
        began, deadline = time.time(), time.monotonic() + PATIENCE
        while not self.has_ended() and time.monotonic() < deadline:
            heartbeat = read_heartbeat(self.workdir)
            if heartbeat.get("time", 0) > began and heartbeat["status"] == "training":
                return
            time.sleep(0.05)

    def disturb(self, number, everyone, chance):
        """Sends a signal to one training process or to all; a stopped one continues later."""
        trainers = []
        for supervisor in self._supervisors:
            with contextlib.suppress(psutil.Error):
                trainers += psutil.Process(supervisor.pid).children()
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

    def wait(self):
        """Waits for the end of the run."""
        deadline = time.monotonic() + PATIENCE
        while not self.has_ended():
            if time.monotonic() > deadline:
                words = "\n".join(log.read_text()[-2000:] for log in self._logs)
                self.end()
                raise Failure(f"{self.workdir} has not ended within {PATIENCE} s:\n{words}")
            time.sleep(0.2)

    def end(self):
        """Kills everything."""
        for supervisor in self._supervisors:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(supervisor.pid).children():
                    process.kill()
            supervisor.kill()


def soak(root: Path, processes, events, seed, settings=None):
    """Disturbs runs `events` times; returns what happened.

    Raises:
      Failure: a run ends in another state, or does not end.
    """
    chance = random.Random(seed)
    work = Soak(root, {"train.hang_timeout": HANG_TIMEOUT} | (settings or {}))
    whole = Pod(work, root / "whole", processes)
    whole.wait()
    wanted = result(whole.workdir)
    happened, runs = collections.Counter(), []
    pod = Pod(work, root / "run_0", processes)
    for _ in tqdm(range(events), desc="events", unit="event"):
        if chance.random() < 0.5:  # in a step or a save, else wherever the processes are by then
            pod.wait_for_steps()
        time.sleep(LONGEST * chance.random())
        if pod.has_ended():
            compare(pod.workdir, wanted)
            runs.append(pod.workdir)
            pod = Pod(work, root / f"run_{len(runs)}", processes)
            time.sleep(LONGEST * chance.random())
        name = chance.choice([*EVENTS])
        pod.disturb(*EVENTS[name], chance)
        happened[name] += 1
    pod.wait()
    compare(pod.workdir, wanted)
    check_checkpoints(pod.workdir)
    return {
        "processes": processes,
        "runs_finished": len(runs) + 1,
        "events": dict(sorted(happened.items())),
    }


def main():
    """Soaks."""
    root = Path(cli.required(flags.FLAGS["workdir"])).absolute()
    if root.exists():
        raise UserError(f"--workdir={root} exists already; name a new directory")
    given = flags.FLAGS
    figures = soak(root, given.pod_size, given.events, given.seed)
    print(
        f"{sum(figures['events'].values())} events in {figures['runs_finished']} run(s) of "
        f"{figures['processes']} processes: all ended bit for bit as the run without events"
    )
    for what, count in figures["events"].items():
        print(f"{count:4d}  {what}")
    report(figures, given.json)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    flags.DEFINE_string("workdir", None, "a directory for the runs")
    flags.DEFINE_integer("pod_size", 2, "processes of a run", lower_bound=2)
    flags.DEFINE_integer("events", 20, "how often something happens to a run", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the events and their moments")
    flags.DEFINE_string("json", None, "a file for the figures")
    cli.run(main)

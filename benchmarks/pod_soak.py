"""A soak test of several processes: whatever happens to them, their supervisors bring the run to
the same end, without anybody's help.

`python -m benchmarks.pod_soak --workdir=DIR [--pod_size=2] [--events=20] [--store] [--seed=0]
[--json=FILE]`: first the processes train a small model without a disturbance. Then the same run is
started over and over under `aoe_jax.supervise`, one supervisor for each process, and disturbed at
random moments:

- SIGKILL or SIGTERM to one training process or to all of them, or SIGSTOP to one for longer than
  `train.hang_timeout`;
- the local copies of one process are lost (`checkpoint.local_path`);
- the clock of one host is stepped by up to two hours, forward or back (`tests/stepped_clock.c`);
- the disk of the run, once that has begun, is unmounted for up to 20 s, if this program may mount;
  with `--store` the run is in an object store instead (`tests/object_store.py`), which answers 503
  for up to a minute.

A run that reaches its end is compared with the first, bit for bit, as in `benchmarks.soak`. The
program fails at the first difference, or when a supervisor gives up.
"""

import collections
import contextlib
import ctypes
import functools
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from absl import flags
from tqdm import tqdm

from aoe_jax.storage.paths import is_remote, parsed_path
from benchmarks.soak import (
    Failure,
    Soak,
    check_checkpoints,
    compare,
    read_heartbeat,
    result,
)
from benchmarks.timing import new_workdir, report, run_benchmark
from tests.hasty import xla_flags
from tests.object_store import object_store

HANG_TIMEOUT = 30  # seconds; on a busy machine a restore alone may take half of it
LONGEST = 20  # seconds from an event to the next
LONGEST_STEP = 7200  # seconds that a clock is stepped by
PATIENCE = 900  # seconds from the last event to the end of a run


class Host:
    """The supervisor of one process of a run, and its clock."""

    def __init__(self, command, log: Path, work: Soak, clock_library):
        """Starts the supervisor; its output and that of its process go to the file `log`."""
        self.log, clock = log, {}
        if clock_library:
            file = log.with_suffix(".clock")
            file.write_bytes(bytes(8))
            with file.open("r+b") as opened:
                self._clock = ctypes.c_int64.from_buffer(mmap.mmap(opened.fileno(), 8))
            clock = {"LD_PRELOAD": clock_library, "CLOCK": str(file)}
        with log.open("w") as stderr:
            self.supervisor = subprocess.Popen(
                command, cwd=work.cwd, env=work.environment | clock, stderr=stderr
            )

    def step_clock(self, seconds):
        self._clock.value = seconds

    def trainer(self):
        """The training process, a list of one, or none."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.supervisor.pid).children()
        return []


class Pod:
    """The supervised processes of one run."""

    def __init__(self, work: Soak, workdir, processes: int, logs: Path, clock_library=None):
        """Starts the supervisors, which write to files in `logs`; `build_clock` made the library
        that `step_clock` needs.
        """
        self.workdir = workdir
        flags = [f"--coordinator=localhost:{_free_port()}", f"--processes={processes}"]
        flags += ["--join_timeout=120", "--retry_seconds=5"]
        own = [sys.executable, "-m", "aoe_jax.supervise", "--pause=1", "--restarts=20", "--"]
        command = [*own, *work.command(workdir), *flags]
        self._hosts = [
            Host(
                [*command, f"--process={i}"], logs / f"{workdir.name}_{i}.log", work, clock_library
            )
            for i in range(processes)
        ]

    def has_ended(self):
        """Whether all supervisors have ended; raises `Failure` if one of them gave up."""
        statuses = [host.supervisor.poll() for host in self._hosts]
        if any(status for status in statuses if status is not None):
            self.end()
            raise Failure(f"supervisors ended with {statuses}:\n{self._words()}")
        return None not in statuses

    def _words(self):
        return "\n".join(host.log.read_text()[-2000:] for host in self._hosts)

    def wait_for_steps(self):
        """Waits until steps are computed from now on, or the run has ended."""
        before, deadline = read_heartbeat(self.workdir), time.monotonic() + PATIENCE
        while not self.has_ended() and time.monotonic() < deadline:
            heartbeat = read_heartbeat(self.workdir)
            if heartbeat != before and heartbeat.get("status") == "training":
                return
            time.sleep(0.5 if is_remote(self.workdir) else 0.05)

    def wait_for_beginning(self):
        """Waits until the supervisors have seen that the run has begun."""
        deadline = time.monotonic() + PATIENCE
        while not self.has_ended() and time.monotonic() < deadline:
            if read_heartbeat(self.workdir):
                time.sleep(2)
                return
            time.sleep(0.05)

    def send(self, number, everyone, chance):
        """Sends a signal to one training process or to all; a stopped one continues later."""
        trainers = [trainer for host in self._hosts for trainer in host.trainer()]
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

    def step_clock(self, chance):
        """Steps the clock of one host."""
        chance.choice(self._hosts).step_clock(chance.randint(-LONGEST_STEP, LONGEST_STEP))

    def wait(self):
        """Waits for the end of the run."""
        deadline = time.monotonic() + PATIENCE
        while not self.has_ended():
            if time.monotonic() > deadline:
                words = self._words()
                self.end()
                raise Failure(f"{self.workdir} has not ended within {PATIENCE} s:\n{words}")
            time.sleep(0.2)

    def stop(self):
        """Asks the supervisors to stop, and waits for them."""
        for host in self._hosts:
            host.supervisor.terminate()
        for host in self._hosts:
            host.supervisor.wait(PATIENCE)

    def end(self):
        """Kills everything."""
        for host in self._hosts:
            with contextlib.suppress(psutil.Error):
                for process in host.trainer():
                    process.kill()
            host.supervisor.kill()


def _free_port():
    """A port below those that the system gives to connections, so that it stays free."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise OSError("no port is free")


class Disk:
    """A folder that is mounted, and can vanish for a while."""

    def __init__(self, root: Path):
        """Mounts `root/disk` as `root/mounted`."""
        self._disk, self.path = root / "disk", root / "mounted"
        self._disk.mkdir()
        self.path.mkdir()
        self._mount()

    def _mount(self):
        subprocess.run(["mount", "--bind", self._disk, self.path], check=True)

    def unmount(self):
        """Unmounts the disk, also while files on it are open."""
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def vanish(self, chance, pod):
        """Unmounts the disk for a while, once the run has begun: nobody but its user can know that
        the disk of a new run is missing.
        """
        pod.wait_for_beginning()
        self.unmount()
        time.sleep(20 * chance.random())
        self._mount()


def _can_mount():
    return hasattr(os, "geteuid") and os.geteuid() == 0 and bool(shutil.which("mount"))


@contextlib.contextmanager
def _place(root: Path, in_store, chance):
    """Yields the folder of the runs, and by name the event that only this kind of place has."""
    if in_store:
        with object_store() as store:
            os.environ.update(store.variables)

            def fail(pod):
                store.fails_until = time.monotonic() + 60 * chance.random()

            yield parsed_path("gs://bucket/runs", "--workdir", in_store=True), {"503": fail}
    elif _can_mount():
        disk = Disk(root)
        try:
            yield disk.path, {"disk vanishes": functools.partial(disk.vanish, chance)}
        finally:
            disk.unmount()
    else:
        yield root, {}


def soak(root: Path, processes, events, seed, settings=None, in_store=False):
    """Disturbs runs `events` times; returns what happened. Raises `Failure` if a run ends in
    another state, or does not end.
    """
    chance, began = random.Random(seed), time.monotonic()
    copies = root / "copies"
    copies.mkdir(parents=True)
    settings = {"checkpoint.local_path": copies, "checkpoint.local_every": 2} | (settings or {})
    work = Soak(root, {"train.hang_timeout": HANG_TIMEOUT} | settings)
    clock_library = build_clock(root)

    def lose_copies(pod):
        for copy in copies.glob(f"*/process_{chance.randrange(processes)}/*.npz"):
            copy.unlink(missing_ok=True)

    with _place(root, in_store, chance) as (folder, more_events):
        more_events["copies are lost"] = lose_copies

        def start(name):
            return Pod(work, folder / name, processes, root, clock_library)

        pod = start("whole")
        pod.wait()
        wanted = result(pod.workdir)
        happened, runs = collections.Counter(), 0
        pod = start("run_0")
        try:
            for _ in tqdm(range(events), desc="events", unit="event"):
                if chance.random() < 0.5:  # in a step or a save, else wherever they are by then
                    pod.wait_for_steps()
                time.sleep(LONGEST * chance.random())
                if pod.has_ended():
                    compare(pod.workdir, wanted)
                    runs += 1
                    pod = start(f"run_{runs}")
                    time.sleep(LONGEST * chance.random())
                name = _disturb(pod, more_events, chance)
                tqdm.write(f"{time.strftime('%H:%M:%S')} {pod.workdir.name}: {name}", sys.stderr)
                happened[name] += 1
            pod.wait()
        finally:
            pod.end()
        compare(pod.workdir, wanted)
        check_checkpoints(pod.workdir)
    logs = [log.read_text() for log in root.glob("run_*_0.log")]
    return {
        "processes": processes,
        "runs_finished": runs + 1,
        "starts": sum(log.count("processes,") for log in logs),
        "starts_from_local_copies": sum(log.count("from the local copies of") for log in logs),
        "events": dict(sorted(happened.items())),
        "seconds": time.monotonic() - began,
    }


def _disturb(pod, more_events, chance):
    """Lets one thing happen; returns its name."""
    events = {
        f"{number.name} to {'all' if everyone else 'one'}": functools.partial(
            Pod.send, number=number, everyone=everyone, chance=chance
        )
        for number, everyone in (
            (signal.SIGKILL, False),
            (signal.SIGKILL, True),
            (signal.SIGTERM, False),
            (signal.SIGTERM, True),
            (signal.SIGSTOP, False),
        )
    }
    events |= {"clock is stepped": functools.partial(Pod.step_clock, chance=chance)} | more_events
    name = chance.choice([*events])
    events[name](pod)
    return name


def build_clock(folder: Path) -> str:
    """Compiles `tests/stepped_clock.c`; returns the library."""
    library, source = folder / "stepped_clock.so", Soak.cwd / "tests" / "stepped_clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


def main():
    root = new_workdir(flags.FLAGS["workdir"])
    given = flags.FLAGS
    figures = soak(root, given.pod_size, given.events, given.seed, in_store=given.store)
    print(
        f"{sum(figures['events'].values())} events in {figures['runs_finished']} run(s) of "
        f"{figures['processes']} processes, {figures['seconds']:.0f} s: all ended bit for bit as "
        f"the run without events. {figures['starts_from_local_copies']} of {figures['starts']} "
        "starts went on from local copies"
    )
    for what, count in figures["events"].items():
        print(f"{count:4d}  {what}")
    report(figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", xla_flags())
    flags.DEFINE_string("workdir", None, "a directory for the runs")
    flags.DEFINE_integer("pod_size", 2, "processes of a run", lower_bound=2)
    flags.DEFINE_integer("events", 20, "how often something happens to a run", lower_bound=1)
    flags.DEFINE_bool("store", False, "keep the runs in an object store of this program")
    flags.DEFINE_integer("seed", 0, "of the events and their moments")
    run_benchmark(main)

"""Runs commands as jobs, each in a process of its own, and describes the machine that runs them."""

import json
import logging
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import aoe_jax
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json
from aoe_jax.locking import alone_in
from aoe_jax.stopping import StopRequests

log = logging.getLogger(__name__)

ROOT = Path(aoe_jax.__file__).parents[1]
# By default glibc returns freed memory to the system after every step; on CPU, getting it back
# costs more than a tenth of the time.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
POLL_SECONDS, REPORT_SECONDS = 0.2, 60.0
# Becomes the command, which gets SIGTERM (15) if the thread that started it dies, by
# PR_SET_PDEATHSIG (1). Code between fork and exec would be unsafe in a process with threads.
_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.argv[1], sys.argv[1:])
"""


def beside(path: Path, suffix):
    """Returns a file beside a file or directory, such as its log."""
    return path.with_name(path.name + suffix)


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: tuple[str, ...]
    # What the command writes: a file, or a directory that it locks. Beside it are `.log` (stdout
    # and stderr, appended) and `.outcome.json` with `status` and `last_line`.
    output: Path
    cost: float  # in any unit, to estimate the remaining time
    progress: Callable[[], float]  # the fraction that is done


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time."""

    core: int | None = None  # None: any
    environment: dict[str, str] = field(default_factory=dict)  # selects its devices


def last_line(path: Path):
    """Returns the last line of a log that is not empty."""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_jobs(jobs: list[Job], slots: list[Slot], environment: dict[str, str], stop: StopRequests):
    """Runs jobs in order, one at a time in each slot; a job that fails stops no other.

    Args:
      jobs: the commands.
      slots: the places.
      environment: defaults for variables that are not set.
      stop: the requests to heed.

    Raises:
      Stopped: `stop` was asked; the running jobs were asked too and have ended.
    """
    workers, outcomes = _Workers(slots, environment), {}
    before, started = {job: job.progress() for job in jobs}, time.monotonic()
    reported = started
    with (
        stop.between_steps(several=False),
        ThreadPoolExecutor(len(slots)) as pool,
    ):
        pending = {pool.submit(workers.run, job): job for job in jobs}
        try:
            while pending:
                if stop.asked():
                    raise stop.end("what is done is saved; the same command goes on from there")
                news = []
                for future in wait(pending, POLL_SECONDS, FIRST_COMPLETED).done:
                    job = pending.pop(future)
                    outcomes[job] = future.result()
                    news.append(f"{job.name} has ended")
                if not news and time.monotonic() - reported > REPORT_SECONDS:
                    running = [f"{job.name} {job.progress():.0%}" for job in list(workers.running)]
                    news.append(f"running: {', '.join(running)}")
                if news:
                    reported = time.monotonic()
                    progress = _progress(jobs, before, outcomes, reported - started)
                    log.info("%s; %s", progress, "; ".join(news))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()


class _Workers:
    """What the threads of a pool do: each runs one job at a time in a free slot."""

    def __init__(self, slots, environment):
        self._free, self._environment = queue.SimpleQueue(), environment
        for slot in slots:
            self._free.put(slot)
        self._lock, self._stopped = threading.Lock(), False
        self.running = {}  # Job -> Popen

    def run(self, job):
        """Returns the outcome of a job, or None if it was not started or was stopped."""
        slot = self._free.get()
        try:
            while not (self._stopped or _is_free(job.output)):  # an earlier process is ending there
                time.sleep(POLL_SECONDS)
            return self._run_in(slot, job)
        finally:
            self._free.put(slot)

    def _run_in(self, slot, job):
        log_file, outcome_file = (beside(job.output, name) for name in (".log", ".outcome.json"))
        log_file.parent.mkdir(parents=True, exist_ok=True)
        outcome_file.unlink(missing_ok=True)
        if slot.core is not None:
            os.sched_setaffinity(0, {slot.core})  # of this thread and the processes it starts
        with log_file.open("a") as file, self._lock:
            if self._stopped:
                return None
            file.write(f"$ {' '.join(job.command)}\n")
            file.flush()
            process = self.running[job] = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WITH_PARENT, *job.command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment | os.environ | slot.environment,
                process_group=0,  # so that Ctrl-C reaches the jobs only through `stop`
            )
        status = process.wait()
        with self._lock:
            del self.running[job]
        if self._stopped:
            return None
        line = last_line(log_file)
        if status < 0:  # it had no chance to say why, as where memory ran out
            line = f"killed by signal {-status}, after: {line}"
        outcome = {"status": status, "last_line": line}
        write_json(outcome_file, outcome)
        if status:
            message = "%s failed with status %d: %s; its log is %s"
            log.warning(message, job.name, status, line, log_file)
        return outcome

    def stop(self):
        """Asks the running jobs to stop, and starts no more."""
        with self._lock:
            self._stopped = True
            for process in self.running.values():
                process.terminate()


def _is_free(folder):
    if not folder.is_dir():
        return True
    try:
        with alone_in(folder, "workdir"):
            return True
    except UserError:
        return False


def _progress(jobs, before, outcomes, seconds):
    """Says how many jobs have ended, and estimates the remaining time from `seconds` of work."""
    failed = sum(outcome["status"] != 0 for outcome in outcomes.values())
    progress = {job: job.progress() for job in jobs}
    done = sum(job.cost * max(progress[job] - before[job], 0) for job in jobs)
    left = sum(job.cost * (1 - progress[job]) for job in jobs if job not in outcomes)
    text = f"{len(outcomes)} of {len(jobs)} ended"
    if failed:
        text += f", {failed} of them failed"
    if done and left:
        remaining = left / done * seconds
        hours, minutes = f"{remaining / 3600:.1f} h", f"{remaining / 60:.0f} min"
        text += f", about {hours if remaining > 5400 else minutes} left"
    return text


@dataclass(frozen=True)
class Machine:
    """This machine as a place for jobs of a suite."""

    backend: str
    slots: list[Slot]
    environment: dict[str, str]
    stop: StopRequests

    @classmethod
    def here(cls, workdir: Path, n_jobs: int | None, stop: StopRequests):
        """Finds out what is here, and notes it in `machine.json`.

        Args:
          workdir: the directory of the suite.
          n_jobs: jobs at a time; None means one for each core on CPU, one elsewhere. Several jobs
            on GPUs share them out.
          stop: the requests to heed.

        Raises:
          UserError: JAX does not start, or `n_jobs` is impossible here.
        """
        description = _describe()
        file = workdir / "machine.json"
        earlier = machines_of(workdir) if file.exists() else []
        machines = [*(m for m in earlier if m != description), description]
        write_json(file, {"machines": machines})
        # Runs that differ in their seed alone are one program.
        environment = {
            "GLIBC_TUNABLES": ALLOCATOR,
            "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
            "PYTHONUNBUFFERED": "1",
        }
        return cls(description["backend"], slots_of(description, n_jobs), environment, stop)

    def run(self, jobs, together=True):
        """Runs jobs; one after the other where they are not run `together`."""
        slots = self.slots if together else self.slots[:1]
        run_jobs(jobs, slots, self.environment, self.stop)


def _describe():
    # JAX is asked in another process, because this one must not take the accelerator.
    ask = (
        "import jax, json; d = jax.devices(); "
        "print(json.dumps([jax.default_backend(), d[0].device_kind, len(d)]))"
    )
    answer = _output_of(sys.executable, "-c", ask)
    if answer.returncode:
        raise UserError(f"JAX does not start: {(answer.stderr.strip().splitlines() or [''])[-1]}")
    backend, device, devices = json.loads(answer.stdout.splitlines()[-1])
    cpuinfo = Path("/proc/cpuinfo")
    if backend == "cpu" and cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
        device = models[0].strip() if models else device
    return {
        "commit": _commit(),
        "backend": backend,
        "device": device,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _commit():
    try:
        describe = ("describe", "--always", "--dirty", "--exclude=*")
        return _output_of("git", "-C", str(ROOT), *describe).stdout.strip() or None
    except FileNotFoundError:  # git is not installed
        return None


def machines_of(workdir: Path):
    """Returns the machines that have taken part, the latest last.

    A machine whose package versions or commit have changed counts as another one.
    """
    return read_json(workdir / "machine.json")["machines"]


def slots_of(machine, n_jobs):
    """Returns the slots of a machine: on CPU a core each, on GPUs an equal share of them.

    Raises:
      UserError: the machine has no `n_jobs` such slots.
    """
    if machine["backend"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        return [Slot(cores[i % len(cores)]) for i in range(n_jobs or len(cores))]
    if (n_jobs or 1) == 1:
        return [Slot()]
    if machine["backend"] != "gpu":
        wanted = f"on {machine['backend']} a run takes all devices; leave it at 1"
        raise UserError(f"--jobs={n_jobs}: {wanted}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(machine["devices"])]
    if len(devices) % n_jobs:
        wanted = f"must divide the {len(devices)} GPUs, which runs share out"
        raise UserError(f"--jobs={n_jobs}: {wanted}")
    share = len(devices) // n_jobs
    starts = range(0, len(devices), share)
    return [
        Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(devices[i : i + share])}) for i in starts
    ]

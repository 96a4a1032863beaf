"""Runs Python programs in separate processes, and describes the machine that runs them."""

import contextlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import aoe_jax
from aoe_jax.errors import Interrupted, Preempted, Terminated, UserError
from aoe_jax.storage.files import NUMBER, TEXT, read_json, write_json

log = logging.getLogger(__name__)

# By default glibc returns freed memory to the system after every step. On CPU, allocating it again
# costs more than a tenth of the step time, so these settings make glibc keep it.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"
)


def beside(path: Path, suffix):
    return path.with_name(path.name + suffix)


@dataclass(frozen=True)
class Job:
    """A program to run."""

    name: str
    arguments: tuple[str, ...]  # what follows `python` on its command line
    output: Path  # file or folder that it writes; OUTPUT.log and OUTPUT.outcome.json are beside it


def last_line(log_file: Path):
    """Returns the last non-empty line of a log; "" without a log."""
    text = log_file.read_text(errors="replace") if log_file.exists() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def read_outcome(output: Path):
    """Returns `status` and `last_line` of the job that wrote `output`; None if it has not ended."""
    file = beside(output, ".outcome.json")
    schema = {"status": NUMBER, "last_line": TEXT}
    return read_json(file, "remove it", schema) if file.exists() else None


def read_machines(workdir: Path):
    """Returns the descriptions of all machines that ran jobs of a suite; the newest is last."""
    schema = {"machines": [{"backend": TEXT}]}
    return read_json(workdir / "machine.json", "remove it", schema)["machines"]


@dataclass(frozen=True)
class Machine:
    """This machine or a Ray cluster, which runs the jobs of a suite."""

    backend: str
    cores: list[int | None]  # each runs one job at a time; None: a job uses all devices
    environment: dict[str, str]  # default values of environment variables
    of_task: dict | None = None  # Ray's options for a job; None: jobs run on this machine

    @classmethod
    def of_engine(cls, engine, workdir: Path):
        """Describes a machine, and adds it to `machine.json` in the directory of a suite.

        `engine` is "local" for this machine, or "ray" for a node of the Ray cluster. If package
        versions or the commit differ, it counts as another machine. Raises `UserError` if JAX does
        not start, or if there is no cluster.
        """
        of_task = None
        if engine == "local":
            description = _describe()
        else:
            from aoe_jax import cluster

            cluster.connect()
            of_task = cluster.resources()
            [(_, description)] = cluster.results(_describe, [()], of_task)
        earlier = read_machines(workdir) if (workdir / "machine.json").exists() else []
        machines = [*(m for m in earlier if m != description), description]
        write_json(workdir / "machine.json", {"machines": machines})
        environment = {
            "GLIBC_TUNABLES": ALLOCATOR,
            "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),  # shared by all seeds
            "PYTHONUNBUFFERED": "1",
        }
        backend, cores = description["backend"], [None]
        if backend == "cpu" and of_task is None:
            cores = sorted(os.sched_getaffinity(0))
        elif backend == "cpu":
            environment["NPROC"] = "1"  # as many threads as on one core
        return cls(backend, cores, environment, of_task)

    def one_at_a_time(self):
        """Returns this machine with one core, or with a whole node for each job."""
        if self.of_task is None:
            return replace(self, cores=self.cores[:1])
        from aoe_jax import cluster

        return replace(self, of_task=cluster.resources(whole_node=True))

    def run(self, jobs: list[Job]):
        """Runs jobs, in order and one at a time on each core, or as tasks of the cluster.

        A failed job does not stop the others. On SIGTERM or Ctrl-C, the call asks the running jobs
        to stop, waits for their end, and raises `Preempted` or `Interrupted`.
        """
        n_failed = 0
        advice = "the work so far is saved; the same command goes on from there"
        if self.of_task is None:
            results = self._on_this_machine(jobs)
        else:
            from aoe_jax import cluster

            calls = [(job, None, self.environment) for job in jobs]
            results = cluster.results(run_job, calls, self.of_task)
        try:
            with contextlib.closing(results):
                for n_ended, ((job, *_), status) in enumerate(results, 1):
                    n_failed += not _succeeded(job, status)
                    log.info("%d of %d jobs ended, %d failed", n_ended, len(jobs), n_failed)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {advice}") from None
        except Terminated:
            raise Preempted(f"preempted: {advice}") from None

    def _on_this_machine(self, jobs):
        free, stop = queue.SimpleQueue(), threading.Event()
        for core in self.cores:
            free.put(core)

        def run(job):
            core = free.get()
            try:
                return run_job(job, core, self.environment, stop)
            finally:
                free.put(core)

        with ThreadPoolExecutor(len(self.cores)) as threads:
            try:
                running = {threads.submit(run, job): (job,) for job in jobs}
                for ended in as_completed(running):
                    yield running[ended], ended.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                stop.set()


def run_job(job: Job, core: int | None, environment, stop: threading.Event | None = None):
    """Runs a job on a core (None: on any), and returns its exit status. After `stop` or an
    exception (Ray interrupts a task with `KeyboardInterrupt`) it asks the job to stop, and waits
    for its end.
    """
    process = _start(job, core, environment)
    try:
        while process.poll() is None and not (stop and stop.is_set()):
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()
    return process.returncode


def _start(job, core, environment):
    beside(job.output, ".outcome.json").unlink(missing_ok=True)
    command = (sys.executable, *job.arguments)
    with beside(job.output, ".log").open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment | os.environ,
            process_group=0,  # so that Ctrl-C reaches the jobs only through `Machine.run`
        )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # threads of the job inherit the core
    return process


def _succeeded(job, status):
    log_file = beside(job.output, ".log")
    line = last_line(log_file)
    if status < 0:  # the process could not log a reason
        line = f"killed by signal {-status}, after: {line}"
    write_json(beside(job.output, ".outcome.json"), {"status": status, "last_line": line})
    if status:
        message = "%s failed with status %d: %s; its log is %s"
        log.warning(message, job.name, status, line, log_file)
    return status == 0


def _describe():
    # Another process starts JAX, because this process must not reserve the accelerator.
    ask = (
        "import jax, json; from aoe_jax.planning.hardware import machine; "
        "print(json.dumps({'backend': jax.default_backend()} | machine()))"
    )
    answer = _output_of(sys.executable, "-c", ask)
    if answer.returncode:
        raise UserError(f"JAX does not start: {(answer.stderr.strip().splitlines() or [''])[-1]}")
    machine = json.loads(answer.stdout.splitlines()[-1])
    del machine["allocator"]  # runs set their own allocator
    cpuinfo = Path("/proc/cpuinfo")
    if machine["backend"] == "cpu" and cpuinfo.exists():
        model = re.search(r"^model name.*?:(.*)", cpuinfo.read_text(), re.MULTILINE)
        machine["device"] = model[1].strip() if model else machine["device"]
    commit, root = None, str(Path(aoe_jax.__file__).parents[1])
    with contextlib.suppress(FileNotFoundError):  # if git is not installed
        git = _output_of("git", "-C", root, "describe", "--always", "--dirty", "--exclude=*")
        commit = git.stdout.strip() or None
    return {"commit": commit, **machine}


def _output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)

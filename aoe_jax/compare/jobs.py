"""Runs commands in separate processes, and describes the machine that runs them."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aoe_jax
from aoe_jax.config.checks import require_flag
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
    """A command to run."""

    name: str
    command: tuple[str, ...]
    output: Path  # file or folder that it writes; OUTPUT.log and OUTPUT.outcome.json are beside it


@dataclass(frozen=True)
class Slot:
    """The devices on which one job at a time runs."""

    core: int | None = None  # None: any core
    environment: dict[str, str] = field(default_factory=dict)  # variables that select the devices


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
    """This machine, which runs the jobs of a suite."""

    backend: str
    slots: list[Slot]
    environment: dict[str, str]  # default values of environment variables

    @classmethod
    def here(cls, workdir: Path, n_jobs: int | None):
        """Describes this machine, and adds it to `machine.json` in the directory of a suite.

        If package versions or the commit differ, it counts as another machine. `n_jobs` is the
        number of jobs that run at a time; None means one per core on CPU, else one. Raises
        `UserError` if JAX does not start, or if this machine cannot run `n_jobs` at a time.
        """
        description = _describe()
        earlier = read_machines(workdir) if (workdir / "machine.json").exists() else []
        machines = [*(m for m in earlier if m != description), description]
        write_json(workdir / "machine.json", {"machines": machines})
        environment = {
            "GLIBC_TUNABLES": ALLOCATOR,
            "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),  # shared by all seeds
            "PYTHONUNBUFFERED": "1",
        }
        return cls(description["backend"], slots_of(description, n_jobs), environment)

    def run(self, jobs: list[Job]):
        """Runs jobs in order, one at a time in each slot.

        A failed job does not stop the others. On SIGTERM or Ctrl-C, the call asks the running jobs
        to stop, waits for their end, and raises `Preempted` or `Interrupted`.
        """
        waiting, free, running = list(jobs), list(self.slots), {}  # running: Job -> (Slot, Popen)
        n_ended, n_failed = 0, 0
        advice = "the work so far is saved; the same command goes on from there"
        try:
            while waiting or running:
                while free and waiting:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[job] = slot, _start(job, slot, self.environment)
                time.sleep(0.2)
                ended = [job for job, (_, process) in running.items() if process.poll() is not None]
                for job in ended:
                    slot, process = running.pop(job)
                    free.append(slot)
                    n_ended += 1
                    n_failed += not _succeeded(job, process.returncode)
                    log.info("%d of %d jobs ended, %d failed", n_ended, len(jobs), n_failed)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {advice}") from None
        except Terminated:
            raise Preempted(f"preempted: {advice}") from None
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def _start(job, slot, environment):
    beside(job.output, ".outcome.json").unlink(missing_ok=True)
    with beside(job.output, ".log").open("a") as file:
        file.write(f"$ {' '.join(job.command)}\n")
        file.flush()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment | os.environ | slot.environment,
            process_group=0,  # so that Ctrl-C reaches the jobs only through `Machine.run`
        )
    if slot.core is not None:
        os.sched_setaffinity(process.pid, {slot.core})  # threads of the job inherit the core
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


def slots_of(machine, n_jobs):
    """Returns `n_jobs` slots, each with a CPU core or with an equal number of the GPUs.

    `machine` is from `_describe`. Raises `UserError` if the machine cannot run `n_jobs` at a time.
    """
    if machine["backend"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        return [Slot(cores[i % len(cores)]) for i in range(n_jobs or len(cores))]
    if (n_jobs or 1) == 1:
        return [Slot()]
    wanted = f"on {machine['backend']} a run takes all devices; leave it at 1"
    require_flag(machine["backend"] == "gpu", "jobs", n_jobs, wanted)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(machine["devices"])]
    wanted = f"must divide the {len(devices)} GPUs"
    require_flag(len(devices) % n_jobs == 0, "jobs", n_jobs, wanted)
    share = len(devices) // n_jobs
    shares = [devices[i : i + share] for i in range(0, len(devices), share)]
    return [Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(own)}) for own in shares]

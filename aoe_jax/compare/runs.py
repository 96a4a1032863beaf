"""Trains the runs of a suite: `WORKDIR/runs/SIZE/ARM/seed_N`, each by `train.py` in a process of
its own.

A run that is finished isn't run again, one that was cut off goes on, one that failed is tried
again.
"""

import json
import logging
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import aoe_jax
from aoe_jax.compare.jobs import Job, Slot, run_jobs
from aoe_jax.compare.layout import beside, check_run, folder_of, is_finished, tuning_folder
from aoe_jax.compare.measuring import measure_jobs
from aoe_jax.compare.suite import Suite
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json
from aoe_jax.stopping import StopRequests

log = logging.getLogger(__name__)

ROOT = Path(aoe_jax.__file__).parents[1]
# glibc gives freed memory back to the system after every step; on CPU, getting it again costs more
# than a tenth of the time.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def train_suite(suite: Suite, workdir: Path, n_jobs: int | None, stop: StopRequests):
    """Tunes learning rates where the suite says so, and trains what is missing.

    Args:
      suite: what to run.
      workdir: a directory, made and locked by the caller.
      n_jobs: runs at a time; None: on CPU one for every core, elsewhere one. Several on GPUs share
        them out.
      stop: the requests to heed.

    Raises:
      UserError: a run in `workdir` is of another configuration, or `train.py` isn't there.
      Stopped: `stop` was asked.
    """
    if not (ROOT / "train.py").exists():
        raise UserError(
            f"{ROOT / 'train.py'} isn't there: comparisons run it, so install the package with --editable"
        )
    suite.runs()  # checks all of them
    for name in suite.throughput:
        suite.swept(name)
    machine = _machine()
    _note_machine(workdir, machine)
    slots = _slots(machine, n_jobs)
    # Runs that differ in their seed alone are one program.
    environment = {
        "GLIBC_TUNABLES": ALLOCATOR,
        "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
        "PYTHONUNBUFFERED": "1",
    }
    _train(
        {run: tuning_folder(workdir, run) for run in suite.tuning_runs().values()},
        slots,
        environment,
        stop,
    )
    rates = tuned_rates(suite, workdir)
    for arm, rate in rates.items():
        log.info(
            "learning rate of %s: %s",
            arm,
            "its own, for no run of its tuning has finished" if rate is None else rate,
        )
    runs = suite.runs(rates)
    _train({run: folder_of(workdir, run) for run in runs}, slots, environment, stop)
    in_turn = (
        machine["backend"] == "cpu"
    )  # elsewhere runs are alone on the devices, and the arms of a size may not fit
    # One at a time, for they would slow each other.
    run_jobs(measure_jobs(suite, runs, workdir, in_turn), slots[:1], environment, stop)


def _machine():
    """What runs are made on from now on; JAX is asked in another process, for this one must not
    take the accelerator.
    """
    ask = "import jax, json; d = jax.devices(); print(json.dumps([jax.default_backend(), d[0].device_kind, len(d)]))"
    answer = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise UserError(f"JAX doesn't start: {(answer.stderr.strip().splitlines() or [''])[-1]}")
    backend, device, devices = json.loads(answer.stdout.splitlines()[-1])
    cpuinfo = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in cpuinfo.read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": _commit(),
        "backend": backend,
        "device": device if backend != "cpu" or not models else models[0],
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _commit():
    """The commit of this code, `-dirty` if it has been changed since; None where git doesn't know."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def machines_of(workdir: Path):
    """The machines that have taken part, the latest last; one whose versions or commit have changed
    is another.
    """
    found = read_json(workdir / "machine.json")
    return found.get("machines") or [found]  # the file once was of the last machine alone


def _note_machine(workdir, machine):
    file = workdir / "machine.json"
    earlier = machines_of(workdir) if file.exists() else []
    write_json(file, {"machines": [*(m for m in earlier if m != machine), machine]})


def _slots(machine, n_jobs):
    """Where runs go, one at a time in each: on CPU a core, so that they don't slow each other; of
    GPUs some, or all.
    """
    if machine["backend"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        return [Slot(cores[i % len(cores)]) for i in range(n_jobs or len(cores))]
    if (n_jobs or 1) == 1:
        return [Slot()]
    if machine["backend"] != "gpu":
        raise UserError(
            f"--jobs={n_jobs}: on {machine['backend']} a run takes all devices; leave it at 1"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(machine["devices"])]
    if len(devices) % n_jobs:
        raise UserError(
            f"--jobs={n_jobs}: must divide the {len(devices)} GPUs, which runs share out"
        )
    size = len(devices) // n_jobs
    of_jobs = [devices[i : i + size] for i in range(0, len(devices), size)]
    return [Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(of_job)}) for of_job in of_jobs]


def _train(folders, slots, environment, stop):
    for run, folder in folders.items():
        check_run(folder, run)
    jobs = [_job(run, folder) for run, folder in folders.items() if not is_finished(folder, run)]
    if jobs:
        log.info("%d of %d runs to do, %d at a time", len(jobs), len(folders), len(slots))
        run_jobs(jobs, slots, environment, stop)


def _job(run, folder):
    configuration = beside(folder, ".config.json")
    configuration.parent.mkdir(parents=True, exist_ok=True)
    write_json(configuration, run.config.to_dict())
    train, given = str(ROOT / "train.py"), f"--config={ROOT}/configs/saved.py:{configuration}"

    def progress():
        if is_finished(folder, run):
            return 1.0
        heartbeat = folder / "heartbeat.json"
        return (
            (read_json(heartbeat).get("step") or 0) / run.config.train.steps
            if heartbeat.exists()
            else 0.0
        )

    return Job(
        run.name,
        (sys.executable, train, given, f"--workdir={folder}"),
        beside(folder, ".log"),
        beside(folder, ".outcome.json"),
        folder,
        run.flops,
        progress,
    )


def tuning_nlls(suite: Suite, workdir: Path):
    """`{arm: {learning rate: validation nll}}` of the tuning: None of a run that isn't finished,
    inf of one that diverged.

    Raises:
      UserError: a run is of another configuration.
    """
    found = {}
    for (arm, rate), run in suite.tuning_runs().items():
        folder = tuning_folder(workdir, run)
        check_run(folder, run)
        nll = None
        if is_finished(folder, run):
            nll = read_json(folder / "summary.json")["metrics"]["validation_nll"]
            nll = math.inf if nll is None else nll
        found.setdefault(arm, {})[rate] = nll
    return found


def tuned_rates(suite: Suite, workdir: Path):
    """The peak learning rate of each arm: that of the lowest nll; None, its own, where no run of
    the tuning has finished.

    An arm whose runs have begun keeps the rate that they have begun with, whatever has been tuned
    since.
    """
    found, begun = {}, _begun_rates(suite, workdir) if suite.tuning else {}
    for arm, nlls in tuning_nlls(suite, workdir).items():
        finished = {
            rate: nll for rate, nll in nlls.items() if nll is not None and math.isfinite(nll)
        }
        found[arm] = begun.get(arm) or (min(finished, key=finished.get) if finished else None)
    return found


def _begun_rates(suite, workdir):
    """`{arm: rate}` of the arms that have a run, with a rate of the tuning."""
    found = {}
    for run in suite.runs():
        file = folder_of(workdir, run) / "config.json"
        if run.arm not in found and file.exists():
            rate = read_json(file)["train"]["learning_rate"] / suite.sizes[run.size].rate_factor
            found[run.arm] = next(
                (tuned for tuned in suite.tuning.learning_rates if math.isclose(tuned, rate)), None
            )
    return found

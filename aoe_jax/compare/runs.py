"""Trains the runs of a suite, each by `aoe_jax.train` in a process of its own.

A run is in `WORKDIR/runs/SIZE/ARM/seed_N`. A finished run is not repeated, an interrupted run goes
on, and a failed run is tried again.
"""

import logging
import math
import sys
from pathlib import Path

from aoe_jax.compare.jobs import Job, Machine, beside
from aoe_jax.compare.suite import TUNING_SEED, Run, Suite
from aoe_jax.errors import UserError
from aoe_jax.json_files import COUNT, NUMBER, Kind, or_none, read_json, write_json
from aoe_jax.training.workdir import check_workdir, read_run_config

_NUMBERS = Kind(
    "numbers by name",
    lambda v: isinstance(v, dict) and all(map(or_none(NUMBER).holds, v.values())),
)

log = logging.getLogger(__name__)


def folder_of(workdir: Path, run: Run):
    return workdir / ("tuning" if run.seed == TUNING_SEED else "runs") / run.name


def check_run(folder: Path, run: Run):
    """Raises `UserError` if a directory holds another run, or another number of steps of this run.

    The number of steps matters because it decides the learning rate at each step.
    """
    check_workdir(folder, run.config)
    file, steps = folder / "config.json", run.config.train.steps
    found = read_run_config(file).train.steps if file.exists() else steps
    if found != steps:
        raise UserError(
            f"workdir {folder} holds another configuration: train.steps is {found} there, "
            f"{steps} here. Use another --workdir"
        )


def is_finished(folder: Path, run: Run):
    summary = folder / "summary.json"
    steps = run.config.train.steps
    return summary.exists() and read_summary(summary)["metrics"].get("step") == steps


def read_summary(file: Path):
    return read_json(file, schema={"metrics": _NUMBERS, "memory": or_none(_NUMBERS)})


def train_suite(suite: Suite, workdir: Path, machine: Machine):
    """Tunes learning rates where the suite says so, and trains the missing runs.

    The caller has made and locked `workdir`. Raises `UserError` if it has a run of another
    configuration, and `Stopped` if the machine's `stop` was asked.
    """
    _train(suite.tuning_runs().values(), workdir, machine)
    rates = tuned_rates(suite, workdir)
    for arm, rate in rates.items():
        configured = "as configured, because none of its tuning runs has finished"
        log.info("learning rate of %s: %s", arm, configured if rate is None else rate)
    _train(suite.runs(rates), workdir, machine)


def _train(runs, workdir, machine):
    folders = {run: folder_of(workdir, run) for run in runs}
    for run, folder in folders.items():
        check_run(folder, run)
    jobs = [_job(run, folder) for run, folder in folders.items() if not is_finished(folder, run)]
    if jobs:
        log.info("%d of %d runs to do, %d at a time", len(jobs), len(folders), len(machine.slots))
        machine.run(jobs)


def _job(run, folder):
    configuration = beside(folder, ".config.json")
    configuration.parent.mkdir(parents=True, exist_ok=True)
    write_json(configuration, run.config.to_dict())
    given = f"--config={configuration}"
    command = (sys.executable, "-m", "aoe_jax.train", given, f"--workdir={folder}")

    def progress():
        heartbeat = folder / "heartbeat.json"
        if is_finished(folder, run):
            return 1.0
        schema = {"step": or_none(COUNT)}
        step = read_json(heartbeat, schema=schema).get("step") if heartbeat.exists() else 0
        return (step or 0) / run.config.train.steps

    return Job(run.name, command, folder, run.flops, progress)


def tuning_nlls(suite: Suite, workdir: Path):
    """Returns `{arm: {learning rate: validation nll}}` of the tuning: None for a run that is not
    finished, inf for one that diverged. Raises `UserError` as `check_run` does.
    """
    found = {}
    for (arm, rate), run in suite.tuning_runs().items():
        folder, nll = folder_of(workdir, run), None
        check_run(folder, run)
        if is_finished(folder, run):
            nll = read_summary(folder / "summary.json")["metrics"].get("validation_nll")
            nll = math.inf if nll is None else nll
        found.setdefault(arm, {})[rate] = nll
    return found


def tuned_rates(suite: Suite, workdir: Path):
    """Returns the peak learning rate with the lowest nll of each arm.

    It is None, the configured rate, for an arm none of whose tuning runs has finished. An arm with
    runs in `workdir` keeps the rate that they began with, if the tuning still has this rate. Raises
    `UserError` as `check_run` does.
    """
    found, begun = {}, {}
    for run in suite.runs() if suite.tuning else ():
        file = folder_of(workdir, run) / "config.json"
        if run.arm not in begun and file.exists():
            rate = read_run_config(file).train.learning_rate
            begun[run.arm] = rate / suite.sizes[run.size].rate_factor
    for arm, nlls in tuning_nlls(suite, workdir).items():
        finite = {rate: nll for rate, nll in nlls.items() if nll is not None and nll < math.inf}
        best = min(finite, key=finite.get) if finite else None
        found[arm] = next((r for r in nlls if math.isclose(r, begun.get(arm, 0))), best)
    return found

"""Trains the runs of a suite, each by `aoe_jax.train` in a process of its own.

A run is in `WORKDIR/runs/SIZE/ARM/seed_N`. A run that has finished or diverged is not repeated, an
interrupted run goes on, and a failed run is tried again after the others.
"""

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from aoe_jax.compare.jobs import Job, Machine, beside, read_outcome
from aoe_jax.compare.suite import TUNING_SEED, Run, Suite
from aoe_jax.errors import DivergedError, UserError
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import COUNT, NUMBER, Kind, or_none, read_json, write_json
from aoe_jax.training.run_folder import check_config, read_identities

_NUMBERS = Kind(
    "numbers by name",
    lambda v: isinstance(v, dict) and all(map(or_none(NUMBER).holds, v.values())),
)

log = logging.getLogger(__name__)


def folder_of(workdir: Path, run: Run):
    return workdir / ("tuning" if run.seed == TUNING_SEED else "runs") / run.name


def check_runs(folders: Mapping[Run, Path]):
    """Raises `UserError` if a directory holds another run, another number of steps of this run, or
    a run that saw other data than another one of its size.

    The number of steps matters because it decides the learning rate at each step.
    """
    first_data = {}  # size -> a folder and what it was trained on
    for run, folder in folders.items():
        check_config(folder, run.config)
        file, steps = folder / "config.json", run.config.train.steps
        found = read_run_config(file).train.steps if file.exists() else steps
        if found != steps:
            raise UserError(
                f"workdir {folder} holds another configuration: train.steps is {found} there, "
                f"{steps} here. Use another --workdir"
            )
        if data := read_identities(folder):
            size = "tuning" if run.seed == TUNING_SEED else run.size
            first, there = first_data.setdefault(size, (folder, data))
            if data != there:
                raise UserError(
                    f"{folder} was trained on {', '.join(data)}, {first} on {', '.join(there)}: "
                    "runs of a size need the same data. Remove one of them, or use another "
                    "--workdir"
                )


def is_finished(folder: Path, run: Run):
    summary = folder / "summary.json"
    steps = run.config.train.steps
    return summary.exists() and read_summary(summary)["metrics"].get("step") == steps


def has_diverged(folder: Path):
    return folder.exists() and _status(folder) == DivergedError.status


def _status(folder):
    ended = read_outcome(folder)
    return ended and ended["status"]


def read_summary(file: Path):
    return read_json(file, schema={"metrics": _NUMBERS, "memory": or_none(_NUMBERS)})


def train_suite(suite: Suite, workdir: Path, machine: Machine):
    """Tunes learning rates where the suite says so, and trains the missing runs.

    The caller has made and locked `workdir`. Raises `UserError` if it has a run of another
    configuration; raises like `Machine.run`.
    """
    _train(suite.tuning_runs().values(), workdir, machine)
    rates, incomplete = tuned_rates(suite, workdir), set()
    for arm, nlls in tuning_nlls(suite, workdir).items():
        if None in nlls.values():
            incomplete.add(arm)
            log.warning("%s is not trained, because runs of its tuning have failed", arm)
        else:
            configured = "as configured, because all runs of its tuning have diverged"
            log.info("learning rate of %s: %s", arm, rates[arm] or configured)
    _train([run for run in suite.runs(rates) if run.arm not in incomplete], workdir, machine)


def _train(runs, workdir, machine):
    folders = {run: folder_of(workdir, run) for run in runs}
    check_runs(folders)
    left = {
        run: folder
        for run, folder in folders.items()
        if not (is_finished(folder, run) or has_diverged(folder))
    }
    # One that fails again and again must not keep the others from their turn.
    failed_last = sorted(left.items(), key=lambda item: bool(_status(item[1])))
    if jobs := [_job(run, folder) for run, folder in failed_last]:
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
    finished, inf for one that diverged. Raises `UserError` as `check_runs` does.
    """
    found, runs = {}, suite.tuning_runs()
    folders = {run: folder_of(workdir, run) for run in runs.values()}
    check_runs(folders)
    for (arm, rate), run in runs.items():
        folder = folders[run]
        nll = math.inf if has_diverged(folder) else None
        if is_finished(folder, run):
            nll = read_summary(folder / "summary.json")["metrics"].get("validation_nll")
            nll = math.inf if nll is None else nll
        found.setdefault(arm, {})[rate] = nll
    return found


def tuned_rates(suite: Suite, workdir: Path):
    """Returns the peak learning rate with the lowest nll of each arm.

    It is None, the configured rate, for an arm none of whose tuning runs has finished. An arm with
    runs in `workdir` keeps the rate that they began with, if the tuning still has this rate. Raises
    `UserError` as `check_runs` does.
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

"""Trains the runs of a suite, each by `aoe_jax.train` in a separate process.

The directory of a run is `WORKDIR/runs/SIZE/ARM/seed_N`. A run that has finished or diverged is not
repeated, an interrupted run is continued, and a failed run is tried again after the others.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from aoe_jax.compare.jobs import Job, Machine, beside, read_outcome
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.errors import DivergedError, UserError
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import NUMBER, or_none, read_json, write_json
from aoe_jax.training.run_folder import check_config, read_identities

log = logging.getLogger(__name__)


def folder_of(workdir: Path, run: Run):
    return workdir / "runs" / run.name


def check_runs(folders: Mapping[Run, Path]):
    """Raises `UserError` if a directory has a run of another configuration or number of steps, or
    if runs of a size were trained on different data.

    Another number of steps is refused, because it changes the learning rate of every step.
    """
    first_data = {}  # size -> (folder of a run, data of the run)
    for run, folder in folders.items():
        check_config(folder, run.config)
        file, steps = folder / "config.json", run.config.train.steps
        found = read_run_config(file).train.steps if file.exists() else steps
        if found != steps:
            there = f"train.steps is {found} there, {steps} here"
            raise UserError(
                f"workdir {folder} holds another configuration: {there}. Use another --workdir"
            )
        if data := read_identities(folder):
            first, there = first_data.setdefault(run.size, (folder, data))
            if data != there:
                raise UserError(
                    f"{folder} was trained on {', '.join(data)}, {first} on {', '.join(there)}: "
                    "runs of a size need the same data. Remove one, or use another --workdir"
                )


def is_finished(folder: Path, run: Run):
    summary = folder / "summary.json"
    steps = run.config.train.steps
    return summary.exists() and read_summary(summary)["metrics"].get("step") == steps


def has_diverged(folder: Path):
    ended = read_outcome(folder)
    return folder.exists() and bool(ended) and ended["status"] == DivergedError.status


def read_summary(file: Path):
    return read_json(file, schema={"metrics": {str: or_none(NUMBER)}, "memory": {str: NUMBER}})


def train_suite(suite: Suite, workdir: Path, machine: Machine):
    """Trains the missing runs of a suite.

    The caller must have made and locked `workdir`. Raises `UserError` if `workdir` has a run of
    another configuration, and `Preempted` or `Interrupted` as `Machine.run` does.
    """
    folders = {run: folder_of(workdir, run) for run in suite.runs()}
    check_runs(folders)
    left = {
        run: folder
        for run, folder in folders.items()
        if not (is_finished(folder, run) or has_diverged(folder))
    }
    # Failed runs come last, so that a run that always fails does not delay the others.
    failed_last = sorted(left.items(), key=lambda item: bool(read_outcome(item[1])))
    jobs = []
    for run, folder in failed_last:
        configuration = beside(folder, ".config.json")
        configuration.parent.mkdir(parents=True, exist_ok=True)
        write_json(configuration, run.config.to_stored())
        given = f"--config={configuration}", f"--workdir={folder}"
        jobs.append(Job(run.name, ("-m", "aoe_jax.train", *given), folder))
    log.info("%d of %d runs to do", len(jobs), len(folders))
    machine.run(jobs)

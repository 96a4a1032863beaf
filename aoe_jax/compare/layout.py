"""Where the runs of a suite lie."""

from pathlib import Path

from aoe_jax.compare.suite import Run
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json
from aoe_jax.training.workdir import check_workdir


def folder_of(workdir: Path, run: Run):
    """The directory of a run of the suite."""
    return workdir / "runs" / run.name


def tuning_folder(workdir: Path, run: Run):
    """The directory of a run of its tuning."""
    return workdir / "tuning" / run.name


def beside(path: Path, suffix):
    """A file beside another or a directory, such as its log: a directory itself belongs to
    `train.py`.
    """
    return path.with_name(path.name + suffix)


def check_run(folder: Path, run: Run):
    """Checks that a directory is free or of this very run, as many steps long: its learning rate
    has come down by then.

    Raises:
      UserError: it is of another.
    """
    check_workdir(folder, run.config)
    file = folder / "config.json"
    steps = read_json(file)["train"]["steps"] if file.exists() else run.config.train.steps
    if steps != run.config.train.steps:
        raise UserError(
            f"workdir {folder} holds another configuration: train.steps is {steps} there, {run.config.train.steps} here. "
            "Use another --workdir"
        )


def is_finished(folder: Path, run: Run):
    """Whether a run has been trained to its last step."""
    summary = folder / "summary.json"
    return summary.exists() and read_json(summary)["metrics"]["step"] == run.config.train.steps

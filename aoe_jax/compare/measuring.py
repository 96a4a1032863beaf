"""What is measured of a size once its runs are trained: routing, and the time of a step of each arm. See `measure.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aoe_jax.compare.jobs import Job
from aoe_jax.compare.layout import beside, folder_of, is_finished
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.config import Config
from aoe_jax.json_files import read_json, write_json

ROUTED_KINDS = ("aoe", "router")  # of experts, whose layers choose in a pipeline that `routing` looks into


def step_seconds(workdir: Path, runs: Sequence[Run], size):
    """Seconds of a training step by arm, timed in turn; None where this wasn't done, or for other configurations."""
    file = measured_file(workdir, size)
    if not file.exists():
        return None
    found = read_json(file)
    # As configurations: what was saved before may lack fields that are new.
    configs = {arm: Config.from_config_dict(groups) for arm, groups in found["configs"].items()}
    return found["seconds"] if configs == _by_arm(workdir, runs, size) else None


def measure_jobs(suite: Suite, runs: Sequence[Run], workdir: Path, in_turn):
    """A `Job` for each size that isn't measured yet; `in_turn`: time the steps of its arms too."""
    jobs = [_job(size, runs, workdir, suite.routing_tokens, in_turn) for size in suite.sizes]
    return [job for job in jobs if job is not None]


def _job(size, runs, workdir, tokens, in_turn):
    of_size = {run: folder_of(workdir, run) for run in runs if run.size == size}
    folders = {run: folder for run, folder in of_size.items() if _to_route(folder, run)}
    timed = not in_turn or step_seconds(workdir, runs, size) is not None
    steps = {} if timed else {arm: config.to_dict() for arm, config in _by_arm(workdir, runs, size).items()}
    if not folders and not steps:
        return None
    output = measured_file(workdir, size)
    output.parent.mkdir(exist_ok=True)
    todo = beside(output, ".todo.json")
    routing = [str(folder) for folder in folders.values()]
    write_json(todo, {"routing": routing, "tokens": tokens, "steps": steps, "output": str(output)})

    def progress():
        return 1 - sum(_to_route(folder, run) for run, folder in folders.items()) / (len(folders) or 1)

    command = (sys.executable, "-m", "aoe_jax.compare.measure", f"--todo={todo}")
    log, outcome = beside(output, ".log"), beside(output, ".outcome.json")
    return Job(f"measuring {size}", command, log, outcome, output, float(len(routing) + 1), progress)


def _to_route(folder, run):
    """Whether a run is finished, with a choice of experts whose routing after the last step hasn't been looked at."""
    if run.config.experts.kind not in ROUTED_KINDS or not is_finished(folder, run):
        return False
    file = folder / "routing.json"
    return not file.exists() or read_json(file)["checkpoints"][-1]["step"] != run.config.train.steps


def _by_arm(workdir, runs, size):
    """The configuration, with its first seed, of each arm of a size that has a finished run: others may not train at all."""
    finished = {run.arm for run in runs if run.size == size and is_finished(folder_of(workdir, run), run)}
    return {run.arm: run.config for run in runs if (run.size, run.seed) == (size, 0) and run.arm in finished}


def measured_file(workdir: Path, size):
    """What is measured of a size."""
    return workdir / "measured" / f"{size}.json"

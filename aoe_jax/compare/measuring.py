"""What is measured once runs are trained: of each size routing and the time of a step of each arm,
and sweeps.

Each is a process of its own, see `measure.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from aoe_jax.compare.jobs import Job
from aoe_jax.compare.layout import beside, folder_of, is_finished
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.compare.throughput import missing_points, sweep_file
from aoe_jax.config import Config
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.json_files import read_json, write_json


def step_seconds(workdir: Path, runs: Sequence[Run], size):
    """Seconds of a training step by arm, timed in turn; None where this wasn't done, or for other
    configurations.
    """
    file = measured_file(workdir, size)
    if not file.exists():
        return None
    found = read_json(file)
    # As configurations: what was saved before may lack fields that are new.
    configs = {
        arm: Config.from_config_dict(groups) for arm, groups in found.get("trained", {}).items()
    }
    runs_of_arms = _by_arm(workdir, runs, size)
    wanted = {
        arm: run.config for arm, run in runs_of_arms.items() if arm not in found.get("failed", {})
    }
    return found["seconds"] if configs == wanted else None


def measure_jobs(suite: Suite, runs: Sequence[Run], workdir: Path, in_turn):
    """A `Job` for each size and sweep that isn't measured yet; `in_turn`: time the steps of the
    arms of a size too.
    """
    jobs = [_size_job(size, runs, workdir, suite.routing_tokens, in_turn) for size in suite.sizes]
    jobs += [_sweep_job(name, suite, workdir) for name in suite.throughput]
    return [job for job in jobs if job is not None]


def _size_job(size, runs, workdir, tokens, in_turn):
    of_size = {run: folder_of(workdir, run) for run in runs if run.size == size}
    folders = {run: folder for run, folder in of_size.items() if _to_route(folder, run, tokens)}
    by_arm = _by_arm(workdir, runs, size) if in_turn else {}
    if (
        by_arm.keys() == (step_seconds(workdir, runs, size) or {}).keys()
    ):  # if one has failed, all are tried again
        by_arm = {}
    steps = {
        arm: {"config": run.config.to_dict(), "folder": str(of_size[run])}
        for arm, run in by_arm.items()
    }
    if not folders and not steps:
        return None
    routing = [str(folder) for folder in folders.values()]

    def progress():
        return 1 - sum(_to_route(folder, run, tokens) for run, folder in folders.items()) / (
            len(folders) or 1
        )

    todo = {"routing": routing, "tokens": tokens, "steps": steps}
    return _job(f"measuring {size}", measured_file(workdir, size), todo, len(routing) + 1, progress)


def _sweep_job(name, suite, workdir):
    points = missing_points(suite, workdir, name)
    if not points:
        return None

    def progress():
        return 1 - len(missing_points(suite, workdir, name)) / len(points)

    todo = {"points": points, "topology": suite.throughput[name].is_topology}
    return _job(
        f"measuring throughput {name}", sweep_file(workdir, name), todo, len(points), progress
    )


def _job(name, output, todo, cost, progress):
    """Of a process that does what is to do and writes to the output."""
    output.parent.mkdir(exist_ok=True)
    file = beside(output, ".todo.json")
    write_json(file, todo | {"output": str(output)})
    command = (sys.executable, "-m", "aoe_jax.compare.measure", f"--todo={file}")
    return Job(
        name,
        command,
        beside(output, ".log"),
        beside(output, ".outcome.json"),
        output,
        float(cost),
        progress,
    )


def _to_route(folder, run, tokens):
    """Whether a run is finished, with a choice of experts that hasn't been looked at, on so many
    tokens, at its end.
    """
    if not LAYERS[run.config.experts.kind].selects or not is_finished(folder, run):
        return False
    file = folder / "routing.json"
    if not file.exists():
        return True
    found = read_json(file)
    return (found["checkpoints"][-1]["step"], found.get("wanted_tokens")) != (
        run.config.train.steps,
        tokens,
    )


def _by_arm(workdir, runs, size):
    """The first run of each arm of a size that is finished."""
    found = {}
    for run in runs:
        if run.size == size and is_finished(folder_of(workdir, run), run):
            found.setdefault(run.arm, run)
    return found


def measured_file(workdir: Path, size):
    """What is measured of a size."""
    return workdir / "measured" / f"{size}.json"

"""Measures trained runs and sweeps: routing, the times of steps, and the costs of steps.

Each size and each sweep is measured by a process of its own, `python -m aoe_jax.compare.measure
--todo=FILE`. The JSON file of a size has `routing`, directories of runs whose routing is analysed
(`routing.py`) on `tokens` tokens, and `steps`, runs by arm, each with `config` and `folder`, whose
steps are timed (`step_times.py`). The file of a sweep has its `points` and whether its values are a
`topology`. Both name the `output` file.

A sweep on this machine has the seconds of a step of random tokens, all arms in turn, and the memory
that the compiler plans. For topologies it has the bounds of `aoe_jax.plan`: the least seconds that
public peak figures allow, and the bytes that a chip receives. Virtual devices on this machine's
cores would say nothing about more chips.
"""

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.jobs import Job, Machine, beside
from aoe_jax.compare.routing import analyse
from aoe_jax.compare.runs import folder_of, is_finished, tuned_rates
from aoe_jax.compare.step_times import RepeatedStep, seconds_in_turn
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.hardware import topology_devices
from aoe_jax.json_files import read_json, write_json
from aoe_jax.plan import plan
from aoe_jax.sharding import fill_mesh
from aoe_jax.stopping import StopRequests

log = logging.getLogger("aoe_jax.compare.measure")  # __name__ is __main__ on the command line


def measured_file(workdir: Path, name):
    """Returns the file of the measurements of a size, or of a sweep as `throughput_SWEEP`."""
    return workdir / "measured" / f"{name}.json"


def sweep_file(workdir: Path, name):
    """Returns the file of the measurements of a sweep."""
    return measured_file(workdir, f"throughput_{name}")


def measure_suite(suite: Suite, workdir: Path, machine: Machine):
    """Measures the sizes and sweeps that are not measured yet.

    One process runs at a time, so that they do not slow each other. Steps are timed in turn on CPU
    only: elsewhere each run has the devices to itself, and all arms of a size may not fit.

    Raises:
      Stopped: the machine's `stop` was asked.
    """
    runs = suite.runs(tuned_rates(suite, workdir))
    machine.run(measure_jobs(suite, runs, workdir, machine.backend == "cpu"), together=False)


def measure_jobs(suite: Suite, runs: Sequence[Run], workdir: Path, in_turn):
    """Returns a `Job` for each size and sweep that is not measured yet.

    `in_turn` says whether to time the steps of the arms of each size.
    """
    jobs = [_size_job(size, runs, workdir, suite.routing_tokens, in_turn) for size in suite.sizes]
    jobs += [_sweep_job(name, suite, workdir) for name in suite.throughput]
    return [job for job in jobs if job is not None]


def _size_job(size, runs, workdir, tokens, in_turn):
    def to_route():
        finished = _finished(workdir, runs, size)
        return [str(folder) for folder, run in finished if not _is_routed(folder, run, tokens)]

    by_arm = _first_by_arm(workdir, runs, size) if in_turn else {}
    timed = step_seconds(workdir, runs, size) or {}
    if by_arm.keys() == timed.keys():  # if an arm has failed, all are timed again
        by_arm = {}
    folders = to_route()
    if not folders and not by_arm:
        return None
    steps = {
        arm: {"config": run.config.to_dict(), "folder": str(folder)}
        for arm, (folder, run) in by_arm.items()
    }
    todo = {"routing": folders, "tokens": tokens, "steps": steps}

    def progress():
        return 1 - len(to_route()) / (len(folders) or 1)

    output = measured_file(workdir, size)
    return _job(f"measuring {size}", output, todo, len(folders) + 1, progress)


def _sweep_job(name, suite, workdir):
    points = missing_points(suite, workdir, name)
    if not points:
        return None
    todo = {"points": points, "topology": suite.throughput[name].is_topology}

    def progress():
        return 1 - len(missing_points(suite, workdir, name)) / len(points)

    output = sweep_file(workdir, name)
    return _job(f"measuring throughput {name}", output, todo, len(points), progress)


def _job(name, output, todo, cost, progress):
    output.parent.mkdir(exist_ok=True)
    file = beside(output, ".todo.json")
    write_json(file, todo | {"output": str(output)})
    command = (sys.executable, "-m", "aoe_jax.compare.measure", f"--todo={file}")
    return Job(name, command, output, float(cost), progress)


def _finished(workdir, runs, size):
    of_size = [(folder_of(workdir, run), run) for run in runs if run.size == size]
    return [(folder, run) for folder, run in of_size if is_finished(folder, run)]


def _first_by_arm(workdir, runs, size):
    found = {}
    for folder, run in _finished(workdir, runs, size):
        found.setdefault(run.arm, (folder, run))
    return found


def _is_routed(folder, run, tokens):
    """Whether the last choices of a run have been analysed, or it chooses no experts."""
    file = folder / "routing.json"
    chooses = run.config.routing.choice(run.config.experts)
    if not chooses or not file.exists():
        return not chooses
    found = read_json(file)
    analysed = found["checkpoints"][-1]["step"], found.get("wanted_tokens")
    return analysed == (run.config.train.steps, tokens)


def step_seconds(workdir: Path, runs: Sequence[Run], size):
    """Returns the seconds of a training step by arm, timed in turn.

    The result is None where the finished arms were not timed, or with other configurations.
    """
    file = measured_file(workdir, size)
    if not file.exists():
        return None
    found = read_json(file)
    first = _first_by_arm(workdir, runs, size)
    failed = found.get("failed", {})
    wanted = {arm: run.config for arm, (_, run) in first.items() if arm not in failed}
    return found["seconds"] if _configs(found.get("trained", {})) == wanted else None


def _configs(by_arm):
    """Reads configurations, in which files of earlier versions may lack fields that are new.

    None if they have fields that have gone: then nothing is measured yet.
    """
    try:
        return {arm: Config.from_config_dict(groups) for arm, groups in by_arm.items()}
    except UserError:
        return None


def measured_points(suite: Suite, workdir: Path, name):
    """Yields `(value, {arm: Config}, {arm: figures} or None)` for each value of a sweep.

    The figures are None where these configurations have not been measured.
    """
    file, done = sweep_file(workdir, name), {}
    for point in read_json(file)["points"] if file.exists() else []:
        done[point["value"]] = _configs(point["configs"]), point["figures"]
    for value, configs in suite.swept(name).items():
        measured, figures = done.get(value, (None, None))
        yield value, configs, figures if measured == configs else None


def missing_points(suite: Suite, workdir: Path, name):
    """Returns the points of a sweep that are not measured yet, ready for JSON."""
    return [
        {"value": value, "configs": {arm: config.to_dict() for arm, config in configs.items()}}
        for value, configs, figures in measured_points(suite, workdir, name)
        if figures is None
    ]


def main():
    """Measures; exit status 1 if something failed, which stops nothing else."""
    StopRequests("the same command does what is left").listen()
    todo = read_json(Path(cli.required(flags.FLAGS["todo"])))
    output, failed = Path(todo["output"]), {}
    if "points" in todo:
        measure_points(todo["points"], todo["topology"], output, failed)
    else:
        for folder in todo["routing"]:
            with _noting(f"routing of {folder}", failed):
                analyse(Path(folder), todo["tokens"])
                log.info("analysed the routing of %s", folder)
        if todo["steps"]:
            _time_steps(todo["steps"], output, failed)
    for name, reason in failed.items():
        log.error("%s: %s", name, reason)
    return 1 if failed else 0


@contextlib.contextmanager
def _noting(name, failed):
    """Adds the reason of a failure, such as lack of memory or a damaged checkpoint, to `failed`."""
    try:
        yield
    except Exception as e:
        log.exception("%s", name)
        failed[name] = f"{type(e).__name__}: {e}"


def _time_steps(runs, output, failed):
    """Writes `trained`, the configurations, `seconds` and `failed`, all by arm."""
    steps, configs = {}, {arm: run["config"] for arm, run in runs.items()}
    for arm, run in runs.items():
        with _noting(f"steps of {arm}", failed):
            steps[arm] = RepeatedStep(Config.from_config_dict(run["config"]), Path(run["folder"]))
    seconds = seconds_in_turn(steps)
    for arm, value in seconds.items():
        log.info("%s: %.4f s a step", arm, value)
    reasons = {arm: failed[f"steps of {arm}"] for arm in configs if arm not in steps}
    trained = {arm: configs[arm] for arm in steps}
    write_json(output, {"trained": trained, "seconds": seconds, "failed": reasons})


def measure_points(points, is_topology, output: Path, failed):
    """Measures points of a sweep and adds each to the JSON file `output`.

    The points are of `missing_points`. A point that fails is added to `failed`, `{value: reason}`.
    """
    measure = _traced if is_topology else _timed
    for point in points:
        with _noting(point["value"], failed):
            figures = measure(point["value"], _configs(point["configs"]))
            done = read_json(output)["points"] if output.exists() else []
            others = [other for other in done if other["value"] != point["value"]]
            write_json(output, {"points": [*others, point | {"figures": figures}]})
            seconds = [f"{arm} {of_arm['seconds']:.4g} s" for arm, of_arm in figures.items()]
            log.info("%s: %s", point["value"], ", ".join(seconds))


def _timed(_, configs: Mapping[str, Config]):
    steps = {arm: RepeatedStep(config) for arm, config in configs.items()}
    seconds, figures = seconds_in_turn(steps), {}
    for arm, step in steps.items():
        memory = step.memory["state_bytes"] + step.memory["temporary_bytes"]
        figures[arm] = {"seconds": seconds[arm], "memory_bytes": memory}
    return figures


def _traced(topology, configs: Mapping[str, Config]):
    generation, devices = topology_devices(topology)
    figures = {}
    for arm, config in configs.items():
        found = plan(fill_mesh(config, len(devices)), generation, devices, compiles=False)
        figures[arm] = {
            "seconds": found["step_seconds"],
            "received_bytes": sum(found["collective_bytes"].values()),
            "bound_by": found["bound_by"],
            "mfu_bound": found["mfu_bound"],
        }
    return figures


if __name__ == "__main__":
    flags.DEFINE_string("todo", None, "a JSON file that says what to measure")
    cli.run(main)

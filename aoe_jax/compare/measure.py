"""Measures trained runs and sweeps: routing, the times of steps, and the costs of steps.

Each size and each sweep has a process of its own, `python -m aoe_jax.compare.measure --todo=FILE`.
The JSON file has `points`, whose steps are timed: the values of a sweep, or a single size with the
`folders` of its runs. For a size it also has `routing`, the directories of runs whose routing is
analysed on `tokens` tokens. `output` is the file of the results.

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
from aoe_jax.compare.routing import analyse, read_routing
from aoe_jax.compare.runs import folder_of, is_finished, tuned_rates
from aoe_jax.compare.step_times import RepeatedStep, seconds_in_turn
from aoe_jax.compare.suite import Run, Suite
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.planning.hardware import topology_devices
from aoe_jax.planning.plan import plan
from aoe_jax.storage.files import NUMBER, Kind, read_json, write_json

log = logging.getLogger("aoe_jax.compare.measure")  # __name__ is __main__ on the command line

# A measurement: the value of a setting, and configurations and figures by arm.
_VALUE = Kind("a number or a text", lambda value: isinstance(value, int | float | str))
_POINT = {"value": _VALUE, "configs": {str: {str: {}}}, "figures": {str: {"seconds": NUMBER}}}


def measured_file(workdir: Path, name):
    return workdir / "measured" / f"{name}.json"


def sweep_file(workdir: Path, name):
    return measured_file(workdir, f"throughput_{name}")


def measure_suite(suite: Suite, workdir: Path, machine: Machine):
    """Measures the sizes and sweeps that are not measured yet.

    One process runs at a time, so that they do not slow each other. Steps are timed in turn on CPU
    only: elsewhere each run has the devices to itself, and all arms of a size may not fit.
    """
    runs = suite.runs(tuned_rates(suite, workdir))
    machine.run(measure_jobs(suite, runs, workdir, machine.backend == "cpu"), together=False)


def measure_jobs(suite: Suite, runs: Sequence[Run], workdir: Path, in_turn):
    """Returns a `Job` for each size and sweep that is not measured yet. `in_turn` says whether to
    time the arms of each size.
    """
    jobs = [_size_job(size, runs, workdir, suite.routing_tokens, in_turn) for size in suite.sizes]
    jobs += [_sweep_job(name, suite, workdir) for name in suite.throughput]
    return [job for job in jobs if job is not None]


def _size_job(size, runs, workdir, tokens, in_turn):
    def to_route():
        finished = _finished(workdir, runs, size)
        return [str(folder) for folder, run in finished if not _is_routed(folder, run, tokens)]

    routing, output = to_route(), measured_file(workdir, size)
    first = _first_by_arm(workdir, runs, size) if in_turn else {}
    wanted = {size: {arm: run.config for arm, (_, run) in first.items()}} if first else {}
    folders = {arm: str(folder) for arm, (folder, _) in first.items()}
    points = [point | {"folders": folders} for point in _missing(output, wanted)]
    if not routing and not points:
        return None
    todo = {"routing": routing, "tokens": tokens, "points": points, "topology": False}

    def progress():
        return 1 - len(to_route()) / (len(routing) or 1)

    return _job(f"measuring {size}", output, todo, len(routing) + 1, progress)


def _sweep_job(name, suite, workdir):
    points = missing_points(suite, workdir, name)
    if not points:
        return None
    todo = {"routing": [], "points": points, "topology": suite.throughput[name].is_topology}

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
    found = read_routing(file, run.config)
    analysed = found["checkpoints"][-1]["step"], found.get("wanted_tokens")
    return analysed == (run.config.train.steps, tokens)


def step_seconds(workdir: Path, runs: Sequence[Run], size):
    """Returns the seconds of a training step by arm, timed in turn; None if the finished arms were
    not timed with their present configurations.
    """
    configs = {arm: run.config for arm, (_, run) in _first_by_arm(workdir, runs, size).items()}
    ((_, _, figures),) = measured_points(measured_file(workdir, size), {size: configs})
    return figures and {arm: of_arm["seconds"] for arm, of_arm in figures.items()}


def _configs(by_arm):
    """Reads `{arm: Config}`; None for unknown fields, so that the point counts as not measured."""
    try:
        return {arm: Config.from_config_dict(groups) for arm, groups in by_arm.items()}
    except UserError:
        return None


def measured_points(file: Path, wanted):
    """Yields `(value, {arm: Config}, {arm: figures})` for each item of `wanted`.

    Figures are None where the file has no measurement of these configurations; an arm that failed
    is missing from them.
    """
    done = {}
    for point in _done(file):
        done[point["value"]] = _configs(point["configs"]), point["figures"]
    for value, configs in wanted.items():
        measured, figures = done.get(value, (None, None))
        yield value, configs, figures if measured == configs else None


def _done(file):
    return read_json(file, "remove it", {"points": [_POINT]})["points"] if file.exists() else []


def missing_points(suite: Suite, workdir: Path, name):
    return _missing(sweep_file(workdir, name), suite.swept(name))


def _missing(file, wanted):
    return [
        {"value": value, "configs": {arm: config.to_dict() for arm, config in configs.items()}}
        for value, configs, figures in measured_points(file, wanted)
        # After one arm has failed, all arms are timed again in turn.
        if figures is None or figures.keys() != configs.keys()
    ]


def main():
    """Measures what `--todo` lists; returns 1 if a part failed, after all others are done."""
    todo = read_json(Path(cli.required(flags.FLAGS["todo"])))
    output, failed = Path(todo["output"]), {}
    for folder in todo["routing"]:
        with _noting(f"routing of {folder}", failed):
            analyse(Path(folder), todo["tokens"])
            log.info("analysed the routing of %s", folder)
    measure_points(todo["points"], todo["topology"], output, failed)
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


def measure_points(points, is_topology, output: Path, failed):
    """Measures points of `missing_points` and adds each to the JSON file `output`; failures of
    points and arms go to `failed`, `{name: reason}`.
    """
    measure = _traced if is_topology else _timed
    for point in points:
        with _noting(point["value"], failed):
            figures = measure(point, _configs(point["configs"]), failed)
            others = [other for other in _done(output) if other["value"] != point["value"]]
            done = {name: point[name] for name in ("value", "configs")} | {"figures": figures}
            write_json(output, {"points": [*others, done]})
            seconds = [f"{arm} {of_arm['seconds']:.4g} s" for arm, of_arm in figures.items()]
            log.info("%s: %s", point["value"], ", ".join(seconds))


def _timed(point, configs: Mapping[str, Config], failed):
    steps = {}
    for arm, config in configs.items():
        with _noting(f"{point['value']}: steps of {arm}", failed):
            folder = point.get("folders", {}).get(arm)
            steps[arm] = RepeatedStep(config, folder and Path(folder))
    seconds, figures = seconds_in_turn(steps), {}
    for arm, step in steps.items():
        memory = step.memory["state_bytes"] + step.memory["temporary_bytes"]
        figures[arm] = {"seconds": seconds[arm], "memory_bytes": memory}
    return figures


def _traced(point, configs: Mapping[str, Config], failed):
    generation, devices = topology_devices(point["value"])
    figures = {}
    for arm, config in configs.items():
        found = plan(config, generation, devices, compiles=False)
        figures[arm] = {
            "seconds": found["step_seconds"],
            "received_bytes": sum(found["collective_bytes"].values()),
        }
    return figures


if __name__ == "__main__":
    flags.DEFINE_string("todo", None, "a JSON file that says what to measure")
    cli.run(main)

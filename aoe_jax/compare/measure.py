"""Measures trained runs and sweeps: choices of experts, step times and memory.

    python -m aoe_jax.compare.measure --suite=FILE --workdir=DIR --point=NAME

A point is a size of the suite, or one value of a sweep. `aoe_jax.compare` starts a process for each
point that is not measured yet. At a size, the process analyses the choices of the finished runs and
times steps of the trained models. At a value of a sweep, it times steps of untrained models on
random tokens. It alternates the steps of the arms, and writes `DIR/measured/NAME.json`.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import flags

from aoe_jax import cli
from aoe_jax.compare.choices import analyse, read_choices
from aoe_jax.compare.jobs import Job, Machine
from aoe_jax.compare.suite import Suite, load_suite
from aoe_jax.compare.train_runs import folder_of, is_finished
from aoe_jax.config.run import Config
from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.storage.files import NUMBER, read_json, write_json
from aoe_jax.training.run_folder import check_data
from aoe_jax.training.step_times import RepeatedStep, seconds_in_turn

log = logging.getLogger("aoe_jax.compare.measure")  # `__name__` is "__main__" in the command


def measured_file(workdir: Path, point):
    return workdir / "measured" / f"{point}.json"


def finished_runs(suite: Suite, workdir: Path, size):
    """Returns `{folder: Run}` of the finished runs of a size, ordered by seed."""
    of_size = {folder_of(workdir, run): run for run in suite.runs() if run.size == size}
    return {folder: run for folder, run in of_size.items() if is_finished(folder, run)}


def configs_by_point(suite: Suite, workdir: Path):
    """Returns `{name of the point: {arm: Config}}`; a size has only arms with a finished run."""
    found = {}
    for size in suite.sizes:
        firsts = _first_seeds(suite, workdir, size)
        found[size] = {arm: run.config for arm, (_, run) in firsts.items()}
    for name in suite.throughput:
        for value, configs in suite.swept(name).items():
            found[f"{name}_{value}"] = configs
    return found


def _first_seeds(suite, workdir, size):
    """Returns `{arm: (folder, Run)}` of the first finished seed of each arm that has a checkpoint,
    or of its first finished seed if none has one.
    """
    first, finished = {}, finished_runs(suite, workdir, size)
    for folder in sorted(finished, key=lambda f: not any(f.glob("checkpoints/[0-9]*"))):
        first.setdefault(finished[folder].arm, (folder, finished[folder]))
    return first


def read_point(workdir: Path, point, configs: Mapping[str, Config]):
    """Returns `{arm: {"seconds", "memory_bytes"}}` of a step, for the arms that were measured with
    these configurations.
    """
    file = measured_file(workdir, point)
    if not file.exists():
        return {}
    of_arm = {"seconds": NUMBER, "memory_bytes": NUMBER}
    found = read_json(file, "remove it", {"configs": {str: {str: {}}}, "costs": {str: of_arm}})
    try:
        measured = {arm: Config.from_config_dict(c) for arm, c in found["configs"].items()}
    except UserError:  # written by a version with other fields
        return {}
    same = {arm for arm, config in configs.items() if measured.get(arm) == config}
    return {arm: cost for arm, cost in found["costs"].items() if arm in same}


def measure_suite(suite: Suite, workdir: Path, machine: Machine, suite_flags):
    """Measures the points that are not measured yet. Raises what `Machine.run` raises.

    One process runs at a time on a node, so that processes do not slow each other. Steps of trained
    models are timed in turn on CPU only. On other devices the runs' own step times are reliable,
    and the arms of a size may not fit into memory together. `suite_flags` are `--suite` and
    `--set`.
    """
    jobs, program = [], ("-m", "aoe_jax.compare.measure", *suite_flags)
    (workdir / "measured").mkdir(exist_ok=True)
    for point, configs in configs_by_point(suite, workdir).items():
        is_timed = point not in suite.sizes or machine.backend == "cpu"
        costs = read_point(workdir, point, configs)
        if unanalysed(suite, workdir, point) or (is_timed and costs.keys() != configs.keys()):
            arguments = (*program, f"--workdir={workdir}", f"--point={point}")
            jobs.append(Job(f"measuring {point}", arguments, measured_file(workdir, point)))
    if jobs:
        log.info("analysing choices of experts and timing steps, which takes minutes")
    machine.one_at_a_time().run(jobs)


def unanalysed(suite: Suite, workdir: Path, size):
    """Returns the folders of finished runs of a size whose last checkpoint is not analysed yet."""
    found = []
    for folder, run in finished_runs(suite, workdir, size).items():
        file, steps = folder / "routing.json", run.config.train.steps
        checkpoints = read_choices(file)["checkpoints"] if file.exists() else []
        is_analysed = checkpoints and checkpoints[-1]["step"] == steps
        if run.config.routing.choice(run.config.experts) and not is_analysed:
            found.append(folder)
    return found


@contextlib.contextmanager
def _noting(name, failed):
    """Catches and logs an exception of the `with` block, and adds it to `failed` with `name`."""
    try:
        yield
    except Exception as e:
        log.exception("%s", name)
        failed.append(f"{name}: {type(e).__name__}: {e}")


def first_validation_batch(folder: Path, config: Config):
    """Returns a host batch of a run's validation split. Raises `UserError` if the data differ."""
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(folder, corpus)
    store = next(iter(corpus.validation.values()))
    return next(eval_batches(store, config.data.seq_len, config.train.batch_size))


def measure_point(suite: Suite, workdir: Path, point, failed):
    """Times the steps of all arms at a point, and adds the reasons of failures to `failed`. An arm
    that cannot be timed now, for example because its checkpoint is gone, has no time; but if it
    has an earlier one, all earlier times stay, because times of different sessions do not compare.
    """
    configs, steps, costs = configs_by_point(suite, workdir)[point], {}, {}
    firsts = _first_seeds(suite, workdir, point)
    for arm, config in configs.items():
        with _noting(f"steps of {arm}", failed):
            folder, _ = firsts.get(arm, (None, None))  # None: an untrained model
            batch = folder and first_validation_batch(folder, config)
            steps[arm] = RepeatedStep(config, batch, folder)
    if read_point(workdir, point, configs).keys() - steps.keys():
        log.warning("the earlier times of the steps stay")
        return
    seconds = seconds_in_turn(steps)
    for arm, step in steps.items():
        memory = step.memory["state_bytes"] + step.memory["temporary_bytes"]
        costs[arm] = {"seconds": seconds[arm], "memory_bytes": memory}
    by_arm = {arm: config.to_dict() for arm, config in configs.items()}
    write_json(measured_file(workdir, point), {"configs": by_arm, "costs": costs})
    log.info("seconds of a step: %s", ", ".join(f"{arm} {s:.4g}" for arm, s in seconds.items()))


def main():
    """Takes all measurements of a point, and then returns 1 if some of them failed, else 0."""
    given, failed = flags.FLAGS, []
    suite, workdir = load_suite(Path(given.suite), given.set), Path(given.workdir)
    for folder in unanalysed(suite, workdir, given.point):
        with _noting(f"choices of {folder}", failed):
            analyse(folder, suite.routing_tokens)
            log.info("analysed the choices of %s", folder)
    if given.point not in suite.sizes or jax.default_backend() == "cpu":
        measure_point(suite, workdir, given.point, failed)
    for reason in failed:
        log.error("%s", reason)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("suite", None, "the file of the suite")
    flags.DEFINE_string("workdir", None, "its working directory")
    flags.DEFINE_string("point", None, "a size, or SWEEP_VALUE")
    flags.DEFINE_multi_string("set", [], "GROUP.FIELD=VALUE for all runs")
    cli.run(main)

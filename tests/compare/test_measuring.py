"""Which step times hold for the runs that are there."""

import dataclasses

from aoe_jax.compare.layout import beside, folder_of
from aoe_jax.compare.measuring import measure_jobs, measured_file, step_seconds
from aoe_jax.compare.suite import load_suite
from aoe_jax.json_files import read_json, write_json
from tests.compare.suites import write_suite


def test_steps_hold_for_equal_configurations(tmp_path):
    """Those saved before a field was new among them, which then had its default."""
    runs = load_suite(write_suite(tmp_path / "suite.py")).runs()
    timed = {run.arm: run.config for run in runs if run.seed == 0 and run.arm != "broken"}
    assert step_seconds(tmp_path, runs, "a") is None
    for run in runs:
        folder = folder_of(tmp_path, run)
        folder.mkdir(parents=True)
        if run.arm in timed:
            write_json(folder / "summary.json", {"metrics": {"step": run.config.train.steps}})
    file, seconds = measured_file(tmp_path, "a"), {"moe": 0.1, "aoe": 0.2}
    file.parent.mkdir()
    write_json(
        file,
        {"trained": {arm: config.to_dict() for arm, config in timed.items()}, "seconds": seconds},
    )
    assert step_seconds(tmp_path, runs, "a") == seconds
    found = read_json(file)
    for groups in found["trained"].values():
        del groups["experts"]["ranks"]
    write_json(file, found)
    assert step_seconds(tmp_path, runs, "a") == seconds
    assert measured_anew(tmp_path, runs) == set()
    write_json(
        file,
        found
        | {
            "trained": {"moe": found["trained"]["moe"]},
            "seconds": {"moe": 0.1},
            "failed": {"aoe": ""},
        },
    )
    assert step_seconds(tmp_path, runs, "a") == {"moe": 0.1}
    assert measured_anew(tmp_path, runs) == {"moe", "aoe"}  # in turn, so both
    others = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, train=decayed(run)))
        for run in runs
    ]
    assert step_seconds(tmp_path, others, "a") is None


def measured_anew(workdir, runs):
    """The arms whose steps would be timed."""
    suite = load_suite(workdir / "suite.py")
    assert [job.name for job in measure_jobs(suite, runs, workdir, in_turn=True)] == [
        "measuring a"
    ]  # routing is missing
    return read_json(beside(measured_file(workdir, "a"), ".todo.json"))["steps"].keys()


def decayed(run):
    return dataclasses.replace(run.config.train, weight_decay=0.3)

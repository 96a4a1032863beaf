"""Which runs a suite trains, their states in the report, and runs that are refused."""

from dataclasses import replace

import pytest

from aoe_jax.compare.jobs import beside
from aoe_jax.compare.results import read_results
from aoe_jax.compare.suite import load_suite
from aoe_jax.compare.train_runs import check_runs, folder_of, train_suite
from aoe_jax.errors import DivergedError, UserError
from aoe_jax.storage.files import write_json
from tests.compare.suites import write_suite


class Recorder:
    """A machine that records the names of jobs and runs none."""

    def run(self, jobs):
        self.names = [job.name for job in jobs]


def note_outcome(folder, status):
    folder.mkdir(parents=True)
    write_json(beside(folder, ".outcome.json"), {"status": status, "last_line": "it says why"})


def test_diverged_runs_are_not_repeated_and_failed_runs_come_last(tmp_path):
    suite, machine = load_suite(write_suite(tmp_path / "suite.py")), Recorder()
    finished = tmp_path / "runs/a/aoe/seed_0"
    finished.mkdir(parents=True)
    summary = {"metrics": {"step": 6, "validation_nll": 5.0}, "memory": {}}
    write_json(finished / "summary.json", summary)
    note_outcome(tmp_path / "runs/a/moe/seed_0", 1)
    note_outcome(tmp_path / "runs/a/broken/seed_1", DivergedError.status)
    train_suite(suite, tmp_path, machine)
    rest = ["a/broken/seed_0", "a/moe/seed_1", "a/aoe/seed_1"]
    assert machine.names == [*rest, "a/moe/seed_0"]
    states = read_results(suite, tmp_path).runs.set_index(["arm", "seed"])
    assert list(states.loc[("broken", 1), ["state", "last_line"]]) == ["diverged", "it says why"]
    assert list(states["state"][["moe", "aoe"]]) == [
        "failed",
        "unfinished",
        "finished",
        "unfinished",
    ]
    summary["metrics"]["validation_nll"] = None  # it is not finite
    write_json(finished / "summary.json", summary)
    row = read_results(suite, tmp_path).runs.set_index(["arm", "seed"]).loc["aoe", 0]
    assert row["state"] == "diverged" and row["last_line"].startswith("diverged: its validation")
    write_json(finished / "summary.json", summary | {"memory": {"state_bytes": "many"}})
    with pytest.raises(UserError, match="state_bytes'] is 'many', not a number"):
        read_results(suite, tmp_path)
    write_json(finished / "summary.json", summary)
    (tmp_path / "runs/a/broken/seed_1").rmdir()  # so that it is trained again
    train_suite(suite, tmp_path, machine)
    assert "a/broken/seed_1" in machine.names


def test_runs_of_a_size_need_the_same_data_and_length(tmp_path):
    runs = load_suite(write_suite(tmp_path / "suite.py")).runs()
    folders = {run: folder_of(tmp_path, run) for run in runs if run.arm == "moe"}
    for run, folder in folders.items():
        folder.mkdir(parents=True)
        write_json(folder / "config.json", run.config.to_dict())
        write_json(folder / "data.json", {"token_stores": ["a"]})
    check_runs(folders)
    run, folder = folders.popitem()
    longer = replace(run, config=replace(run.config, train=replace(run.config.train, steps=9)))
    with pytest.raises(UserError, match=r"train\.steps is 6 there, 9 here"):
        check_runs({longer: folder})
    write_json(folder / "data.json", {"token_stores": ["b"]})
    with pytest.raises(UserError, match=r"seed_1 was trained on b, .*seed_0 on a: "):
        check_runs(folders | {run: folder})

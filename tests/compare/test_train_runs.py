"""Which runs a suite trains: its tuning, failed and diverged runs, and runs that do not fit."""

import math
from dataclasses import replace

import pytest

from aoe_jax.compare.collect import read_results
from aoe_jax.compare.jobs import beside
from aoe_jax.compare.report import tuning
from aoe_jax.compare.suite import load_suite
from aoe_jax.compare.train_runs import (
    check_runs,
    folder_of,
    train_suite,
    tuned_rates,
    tuning_nlls,
)
from aoe_jax.errors import DivergedError, UserError
from aoe_jax.storage.files import write_json
from tests.compare.suites import write_suite

TUNING = "tuning=Tuning((1e-3, 3e-3), steps=3),"


def test_the_best_learning_rate_of_an_arm_is_that_of_its_runs(tmp_path):
    """Found anew from the runs of the tuning, so that one that has failed and is tried again
    counts.
    """
    suite = load_suite(write_suite(tmp_path / "suite.py", TUNING))
    assert tuned_rates(suite, tmp_path) == {"moe": None, "aoe": None, "broken": None}
    nlls = {("moe", 1e-3): 6.0, ("moe", 3e-3): 5.0, ("aoe", 1e-3): 4.0, ("aoe", 3e-3): 5.0}

    def finish_run(key, nll, again=False):
        run = suite.tuning_runs()[key]
        folder = folder_of(tmp_path, run)
        folder.mkdir(parents=True, exist_ok=again)
        write_json(folder / "config.json", run.config.to_dict())
        write_json(folder / "summary.json", {"metrics": {"step": 3, "validation_nll": nll}})

    for key, nll in nlls.items():
        finish_run(key, nll)
    rates = tuned_rates(suite, tmp_path)
    runs = {run.name: run.config.train for run in suite.runs(rates)}
    assert runs["a/moe/seed_0"].learning_rate == 3e-3 and runs["a/aoe/seed_0"].learning_rate == 1e-3
    assert runs["a/broken/seed_0"].learning_rate == 3e-3  # none of its runs has finished: as it is
    finish_run(("broken", 3e-3), None)
    assert tuning_nlls(suite, tmp_path)["broken"] == {1e-3: None, 3e-3: math.inf}  # it has diverged
    assert tuned_rates(suite, tmp_path)["broken"] is None
    finish_run(("broken", 1e-3), 7.0)
    assert tuned_rates(suite, tmp_path)["broken"] == 1e-3
    run = next(run for run in suite.runs(rates) if run.name == "a/moe/seed_0")
    folder_of(tmp_path, run).mkdir(parents=True)
    write_json(folder_of(tmp_path, run) / "config.json", run.config.to_dict())
    finish_run(("moe", 3e-3), 9.0, again=True)
    assert tuned_rates(suite, tmp_path)["moe"] == 3e-3  # as its runs have begun
    longer = load_suite(write_suite(tmp_path / "other.py", TUNING, train__clip_norm=0.5))
    with pytest.raises(
        UserError, match=r"another configuration: train\.clip_norm is 1\.0 there, 0\.5 here"
    ):
        tuned_rates(longer, tmp_path)


class Unmanned:
    """A machine that notes the jobs and runs none."""

    slots = (None,)

    def __init__(self):
        self.asked = []

    def run(self, jobs):
        self.asked.append([job.name for job in jobs])


def note_outcome(folder, status):
    folder.mkdir(parents=True)
    write_json(beside(folder, ".outcome.json"), {"status": status, "last_line": "it says why"})


def test_an_arm_waits_for_its_tuning_and_failed_runs_for_the_others(tmp_path):
    """Runs that have diverged are not repeated: in the tuning they count as the worst."""
    suite = load_suite(write_suite(tmp_path / "suite.py", TUNING))
    folders = {key: folder_of(tmp_path, run) for key, run in suite.tuning_runs().items()}
    for (arm, rate), folder in folders.items():
        if arm == "broken" or (arm == "moe" and rate == 3e-3):
            note_outcome(folder, DivergedError.status)
        elif (arm, rate) != ("aoe", 3e-3):
            folder.mkdir(parents=True)
            write_json(folder / "summary.json", {"metrics": {"step": 3, "validation_nll": 5.0}})
    note_outcome(tmp_path / "runs/a/moe/seed_0", 1)
    note_outcome(tmp_path / "runs/a/broken/seed_1", DivergedError.status)
    machine = Unmanned()
    train_suite(suite, tmp_path, machine)
    of_tuning, of_suite = machine.asked
    assert of_tuning == ["rate_0.003/aoe/seed_1000000"]
    assert of_suite == ["a/broken/seed_0", "a/moe/seed_1", "a/moe/seed_0"]
    assert tuned_rates(suite, tmp_path)["moe"] == 1e-3
    results = read_results(suite, suite.runs(), tmp_path)
    states = results.runs.set_index(["arm", "seed"])[["state", "last_line"]]
    assert list(states.loc["broken", 1]) == ["diverged", "it says why"]
    assert states.loc["moe", 0]["state"] == "failed"
    assert [row["chosen"] for row in tuning(results, tmp_path)["rows"]] == [
        "0.001",
        "waits",
        "none",
    ]
    (tmp_path / "runs/a/broken/seed_1").rmdir()  # so that it is trained again
    train_suite(suite, tmp_path, machine)
    assert "a/broken/seed_1" in machine.asked[-1]


@pytest.mark.parametrize("of_tuning", [False, True])
def test_runs_that_are_compared_need_the_same_data(tmp_path, of_tuning):
    suite = load_suite(write_suite(tmp_path / "suite.py", TUNING))
    runs = suite.tuning_runs().values() if of_tuning else suite.runs()
    first, second = (run for run in runs if run.arm == "moe")
    folders = {run: folder_of(tmp_path, run) for run in (first, second)}
    for run, folder in folders.items():
        folder.mkdir(parents=True)
        write_json(folder / "config.json", run.config.to_dict())
        write_json(folder / "data.json", {"token_stores": ["a"]})
    check_runs(folders)
    write_json(folders[second] / "data.json", {"token_stores": ["b"]})
    with pytest.raises(UserError, match=r"seed_1\d* was trained on b, .*seed_\d+ on a: "):
        check_runs(folders)


def test_a_run_of_other_length_is_refused(tmp_path):
    """Whose learning rate has come down at another step."""
    (run, *_) = load_suite(write_suite(tmp_path / "suite.py")).runs()
    longer = replace(run, config=replace(run.config, train=replace(run.config.train, steps=9)))
    write_json(tmp_path / "config.json", run.config.to_dict())
    check_runs({run: tmp_path})
    with pytest.raises(UserError, match=r"train\.steps is 6 there, 9 here"):
        check_runs({longer: tmp_path})

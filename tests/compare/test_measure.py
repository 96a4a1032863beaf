"""What is measured: which step times and costs hold for the runs and sweeps that are there, and of
what model they are.
"""

import dataclasses
import json
import re

import pytest

from aoe_jax.compare.jobs import beside
from aoe_jax.compare.measure import (
    measure_jobs,
    measure_points,
    measured_file,
    missing_points,
    step_seconds,
    sweep_file,
)
from aoe_jax.compare.reading import read_costs
from aoe_jax.compare.report import at_equal_experts
from aoe_jax.compare.results import LAYER_FIGURES
from aoe_jax.compare.runs import folder_of
from aoe_jax.compare.suite import Arm, Size, Suite, Sweep, load_suite
from aoe_jax.storage.files import read_json, write_json
from configs import tiny
from configs.compare.arms import DENSE, aoe, moe
from tests import runs as tiny_runs
from tests.compare.invented import markdown, results
from tests.compare.suites import write_suite

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "free"), "dense": DENSE}
SMALL = {
    "model": {"n_layers": 1, "unroll": 1, "d_model": 64, "vocab_size": 512},
    "experts": {"d_ffn": 96},
}


def suite_of(sweep, **changes):
    values = {"name": "s", "base": tiny.get_config(), "arms": ARMS, "sizes": {}, "baseline": "moe"}
    return Suite(**values | {"throughput": {"it": sweep}} | changes)


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
    configs = {arm: config.to_dict() for arm, config in timed.items()}
    point = {"value": "a", "configs": configs}
    point["figures"] = {arm: {"seconds": value} for arm, value in seconds.items()}
    write_json(file, {"points": [point]})
    assert step_seconds(tmp_path, runs, "a") == seconds
    for groups in configs.values():
        del groups["experts"]["round_to"]
    write_json(file, {"points": [point]})
    assert step_seconds(tmp_path, runs, "a") == seconds
    assert measured_anew(tmp_path, runs) == set()
    del point["figures"]["aoe"]
    write_json(file, {"points": [point]})
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
    points = read_json(beside(measured_file(workdir, "a"), ".todo.json"))["points"]
    return {arm for point in points for arm in point["configs"]}


def decayed(run):
    return dataclasses.replace(run.config.train, weight_decay=0.3)


def test_machines_that_are_not_here_are_traced(tmp_path):
    changes = SMALL | {"train": {"batch_size": 2}, "data": {"seq_len": 32}}
    suite = suite_of(Sweep("topology", ("v5e:2x2", "v5e:2x4"), changes, arms=("moe",)))
    file = sweep_file(tmp_path, "it")
    file.parent.mkdir()
    failed = {}
    measure_points(missing_points(suite, tmp_path, "it"), True, file, failed)
    assert failed == {}
    assert missing_points(suite, tmp_path, "it") == []
    found = read_json(file)
    del found["points"][0]["configs"]["moe"]["experts"]["round_to"]  # as if that field were new
    write_json(file, found)
    assert missing_points(suite, tmp_path, "it") == []
    costs = read_costs(suite, tmp_path)["it"]
    assert list(costs["x"]) == [4, 8] and list(costs["tokens_per_step"]) == [4 * 64, 8 * 64]
    # FSDP: a chip receives all but its own share of the parameters, twice, and of their gradients.
    received = costs["received_bytes"]
    assert received[1] / received[0] == pytest.approx((7 / 8) / (3 / 4), rel=0.02)
    assert costs["memory_bytes"].isna().all() and (costs["seconds_per_step"] > 0).all()


def test_steps_are_compared_to_those_of_as_many_experts(tmp_path):
    router = {"kind": "router"}
    arms = ARMS | {
        "few": Arm("few", {"experts": router, "routing": {"name": "top_p"}}, reference="aoe"),
        "many": Arm("many", {"experts": router, "routing": {"name": "top_p", "p": 0.9}}),
        "edge": Arm("edge", {"experts": router, "routing": {"name": "top_p", "p": 0.1}}),
        "one": Arm(
            "one", {"experts": {"kind": "thor"}, "balance": {"aux_weight": 0.0}}, matched=False
        ),
    }
    others = {"wider": {"d_ffn": 104}, "three": {"top_k": 3}}
    sizes = {
        name: Size(SMALL | {"experts": SMALL["experts"] | changes}, seeds=1)
        for name, changes in others.items()
    }
    sizes["same"] = Size(SMALL, seeds=2)
    suite = suite_of(
        Sweep("experts.top_k", (1, 2, 4), SMALL, ("moe", "aoe")), arms=arms, sizes=sizes
    )
    file, seconds = (
        sweep_file(tmp_path, "it"),
        {"moe": {1: 1.0, 2: 1.5, 4: 2.5}, "aoe": {1: 1.0, 2: 2.0, 4: 4.0}},
    )
    file.parent.mkdir()
    points = [
        point
        | {
            "figures": {
                arm: {"seconds": of[point["value"]], "memory_bytes": 1.0}
                for arm, of in seconds.items()
            }
        }
        for point in missing_points(suite, tmp_path, "it")
    ]
    write_json(file, {"points": points})

    per_step = {"moe": 3.0, "aoe": 4.0, "few": 6.0, "many": 9.0, "edge": 2.0, "one": 4.0}
    chosen = {"moe": 2, "aoe": 2, "few": 3, "many": 5}

    def reports():
        """Of two layers; means over layers and seeds are 2, 3, 5 and, but for rounding, 1."""
        found = {}
        for run in suite.runs():
            n = chosen.get(run.arm, 0) + run.seed - 0.5
            load = [[n - 1, 0.5], [n - 0.5, 1]]
            if run.arm == "edge":
                load = 2 * [[0.5, 0.5 - 1e-9]]
            first = {"step": 1, "load": [[9, 9]]}
            last = {"step": 9, "load": load}
            others = {name: [0, 0] for name in LAYER_FIGURES}
            if run.arm not in ("one", "dense"):
                checkpoints = [first | others, last | others]
                found[run.size, run.arm, run.seed] = {"checkpoints": checkpoints, "oracle": None}
        return found

    def rows(in_turn):
        found = results(
            suite,
            lambda run: 5.0,
            reports=reports(),
            seconds_per_step=lambda run: per_step.get(run.arm, 1.0),
            timed_in_turn=in_turn,
        )
        rows = at_equal_experts(found, read_costs(suite, tmp_path))
        return [list(row.values()) for row in rows]

    moe, aoe = ARMS["moe"].label, ARMS["aoe"].label
    few = ["same: few", "3.00", aoe, "1.50", "1.00"]
    assert rows(lambda run: True) == [
        few,
        ["same: many", "5.00", moe, "3.00", "-"],
        ["same: edge", "1.00", moe, "0.67", "1.00"],
        ["same: one", "1.00", moe, "1.33", "2.00"],
    ]
    # An arm that was timed in another way than its reference is not compared to it.
    assert rows(lambda run: run.arm != "moe") == [few]


def test_bounds_are_said_to_be_no_measurement(tmp_path):
    sweep = Sweep("topology", ("v5e:2x2", "v5e:4x4"), SMALL | {"train": {"batch_size": 1}})
    suite, file = suite_of(sweep), sweep_file(tmp_path, "it")
    file.parent.mkdir()
    figures = {
        arm: {"seconds": 1e-3 * s, "received_bytes": 1e6 * s}
        for arm, s in (("moe", 1), ("aoe", 2), ("dense", 4))
    }
    write_json(
        file,
        {
            "points": [
                point | {"figures": figures} for point in missing_points(suite, tmp_path, "it")
            ]
        },
    )
    found = results(suite, lambda run: 5.0)
    text = markdown(found, read_costs(suite, tmp_path))
    assert "nothing is measured" in text and "bounds, not measured" in text
    assert re.search(r"0\.50 / 2\.00 +\| +0\.25 / 4\.00", text)
    other = dataclasses.replace(suite, base=tiny.get_config("moe"))
    assert read_costs(other, tmp_path)  # the same configurations
    changed = suite_of(dataclasses.replace(sweep, changes=SMALL))
    assert read_costs(changed, tmp_path) == {}
    assert load_suite("configs/compare/throughput.py").throughput.keys() == {
        "experts",
        "chosen",
        "rank",
        "tokens",
        "chips",
    }


FIRST_STEP = """
import json, sys
from pathlib import Path
import jax
from aoe_jax.training.validation import validation_batches
from aoe_jax.training.step_times import RepeatedStep
from aoe_jax.config.run import Config
from aoe_jax.evaluation.models import load_model
from aoe_jax.training.validation import compile_eval_step
from aoe_jax.storage.files import read_json
for folder in map(Path, sys.argv[1:]):
    config = Config.from_config_dict(read_json(folder / "config.json"))
    model = load_model(folder)
    batch = model.put(next(validation_batches(folder, config, config.train.batch_size)))
    eval_step = compile_eval_step(model.decoder, config.data.document_mask, model.mesh)
    with jax.set_mesh(model.mesh):
        nll, tokens, _ = eval_step(model.params, model.routing_state, batch)
    steps = RepeatedStep(config, folder), RepeatedStep(config)
    print(json.dumps([float(nll.sum() / tokens), *(float(step()["nll"]) for step in steps)]))
"""


def test_a_timed_step_is_one_of_the_trained_model_on_its_validation_split():
    """With gradient accumulation too."""
    status, stdout, stderr = tiny_runs.run(
        ["-c", FIRST_STEP, *(str(tiny_runs.whole_run(n)) for n in (1, 2))]
    )
    assert status == 0, stderr
    lines = stdout.splitlines()
    assert len(lines) == 2
    for evaluated, trained, drawn in map(json.loads, lines):
        assert trained == pytest.approx(evaluated, rel=1e-4)
        assert abs(drawn - evaluated) > 0.1

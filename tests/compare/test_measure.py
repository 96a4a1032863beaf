"""Which measured step times are valid, and which model takes the steps."""

import json

import pytest

from aoe_jax.compare.measure import configs_by_point, measured_file, read_point
from aoe_jax.compare.suite import load_suite
from aoe_jax.compare.train_runs import folder_of
from aoe_jax.storage.files import write_json
from tests import runs as tiny_runs
from tests.compare.suites import write_suite


def test_step_times_are_valid_for_equal_configurations(tmp_path):
    """A field that was added later has its default."""
    suite = load_suite(write_suite(tmp_path / "suite.py"))
    runs = suite.runs()
    assert configs_by_point(suite, tmp_path) == {"a": {}}
    for run in runs:
        folder = folder_of(tmp_path, run)
        folder.mkdir(parents=True)
        if run.arm != "broken":
            metrics = {"step": run.config.train.steps}
            write_json(folder / "summary.json", {"metrics": metrics, "memory": {}})
    configs = configs_by_point(suite, tmp_path)["a"]
    first = [run for run in runs if run.seed == 0 and run.arm != "broken"]
    assert configs == {run.arm: run.config for run in first}
    assert read_point(tmp_path, "a", configs) == {}
    costs = {arm: {"seconds": 0.1, "memory_bytes": 1} for arm in configs}
    point = {"configs": {arm: c.to_dict() for arm, c in configs.items()}, "costs": costs}
    file = measured_file(tmp_path, "a")
    file.parent.mkdir()
    write_json(file, point)
    assert read_point(tmp_path, "a", configs) == costs
    assert read_point(tmp_path, "a", {"moe": configs["moe"]}) == {"moe": costs["moe"]}
    others = {arm: cost for arm, cost in costs.items() if arm != "moe"}
    assert read_point(tmp_path, "a", configs | {"moe": configs["aoe"]}) == others
    for groups in point["configs"].values():
        del groups["experts"]["round_to"]
    write_json(file, point)
    assert read_point(tmp_path, "a", configs) == costs
    point["configs"]["moe"]["experts"]["unheard_of"] = 1
    write_json(file, point)
    assert read_point(tmp_path, "a", configs) == {}


FIRST_STEP = """
import json, sys
from pathlib import Path
import jax
from aoe_jax.compare.measure import first_validation_batch
from aoe_jax.evaluation.models import load_model
from aoe_jax.training.validation import compile_eval_step
from aoe_jax.training.step_times import RepeatedStep
for folder in map(Path, sys.argv[1:]):
    model = load_model(folder)
    config = model.config
    on_host = first_validation_batch(folder, config)
    batch = model.put(on_host)
    eval_step = compile_eval_step(model.decoder, config.data.document_mask, model.mesh)
    with jax.set_mesh(model.mesh):
        nll, tokens, _ = eval_step(model.params, model.routing_state, batch)
    steps = RepeatedStep(config, on_host, folder), RepeatedStep(config)
    print(json.dumps([float(nll.sum() / tokens), *(float(step()["nll"]) for step in steps)]))
"""


@pytest.mark.slow
def test_a_timed_step_is_one_of_the_trained_model_on_its_validation_split():
    """With gradient accumulation too."""
    folders = [str(tiny_runs.whole_run(n)) for n in (1, 2)]
    status, stdout, stderr = tiny_runs.run(["-c", FIRST_STEP, *folders])
    assert status == 0, stderr
    found = [json.loads(line) for line in stdout.splitlines()]
    assert len(found) == 2
    for evaluated, trained, drawn in found:
        assert trained == pytest.approx(evaluated, rel=1e-4)
        assert abs(drawn - evaluated) > 0.1

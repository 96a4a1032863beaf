"""Pruning by the command line: a run becomes a model with fewer experts, which is evaluated,
trained and pruned again.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from aoe_jax.conversion.pruning import prune
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.loading import read_config, read_step
from tests.runs import (
    STEPS,
    as_read_from,
    contents,
    corpus_store,
    fine_tuned,
    finish,
    finished_run,
    kind_run,
    read_metrics,
    run,
    scratch,
    shared,
    start,
    tiny_config,
)

MODULE = ["-m", "aoe_jax.prune"]


@shared
def pruned():
    """`(directory, stdout)` of a run of 4 experts pruned to 3."""
    directory = scratch("pruned") / "aoe"
    status, stdout, stderr = run(
        [*MODULE, f"--workdir={finished_run()}", "--experts=3", f"--output={directory}"]
    )
    assert status == 0, stderr
    return directory, stdout


def test_files():
    directory, stdout = pruned()
    experts = dataclasses.replace(tiny_config().experts, n_experts=3)
    pruned_config = dataclasses.replace(tiny_config(), experts=experts)
    assert read_config(directory) == as_read_from(directory, pruned_config)
    assert read_step(directory) == STEPS
    names = {
        "aoe_jax.json",
        "config.json",
        "data.json",
        "generation_config.json",
        "model.safetensors",
        "prune.json",
        "README.md",
        "configuration_aoe.py",
        "modeling_aoe.py",
    }
    assert contents(directory).keys() == names | {"tokenizer.json", "tokenizer_config.json"}
    report = json.loads((directory / "prune.json").read_text())
    assert (
        report["nll"].keys() == {"before", "uncurl", "frequency_merge", "greedy"}
        and report["method"] == "uncurl"
    )
    assert f"uncurl {report['nll']['uncurl']:.4f}" in stdout.splitlines()[-1]
    card = (directory / "README.md").read_text()
    assert f"made this model of `{finished_run().name}` (step {STEPS})" in card
    assert "4 experts of a layer became 3 by `uncurl`; validation nll: before" in card
    assert "trust_remote_code=True" in card
    for layer in report["layers"]:
        assert len(layer["clusters"]) == 3 and len(layer["load"]) == 4
        assert sorted(
            member for cluster in layer["clusters"] for member in cluster["members"]
        ) == list(range(4))


def test_a_pruned_model_is_evaluated_and_trained(tmp_path):
    directory = shutil.copytree(pruned()[0], tmp_path / "model")
    commands = [
        [
            "eval.py",
            f"--workdir={directory}",
            "--split=validation",
            f"--data=prepared@{corpus_store()}",
        ],
        fine_tuned(directory, tmp_path / "run"),
        [
            "-m",
            "aoe_jax.generate",
            f"--workdir={directory}",
            "--prompt=the state",
            "--max_tokens=4",
        ],
    ]
    for process in [start(command) for command in commands]:
        status, stdout, stderr = finish(process)
        assert status == 0, stderr
    assert stdout.startswith("the state")
    nll = json.loads((directory / "prune.json").read_text())["nll"]
    evaluated = json.loads((directory / "eval.json").read_text())
    np.testing.assert_allclose(evaluated["nll"], nll["uncurl"], rtol=1e-5)
    assert read_metrics(tmp_path / "run")[1][-1]["validation_nll"] < nll["uncurl"]
    of_run = read_metrics(finished_run())[1][-1]["validation_nll"]
    np.testing.assert_allclose(nll["before"], of_run, rtol=1e-5)


def test_a_router_is_trained_alone(tmp_path):
    """Everything else is bit for bit that of the pruned model."""
    directory = tmp_path / "model"
    report = prune(
        kind_run("router")[0], directory, 3, "frequency_merge", n_tokens=2000, baselines=False
    )
    assert report["nll"].keys() == {"before", "frequency_merge"}
    assert json.loads((directory / "config.json").read_text())["model_type"] == "mixtral"
    status, _, stderr = run(fine_tuned(directory, tmp_path / "run", **{"train.router_steps": 4}))
    assert status == 0, stderr
    before, after = (
        jax.device_get(load_model(folder).params) for folder in (directory, tmp_path / "run")
    )
    old, new = (params["layers"]["experts"].pop("w_router") for params in (before, after))
    assert old.shape == (2, 32, 3) and np.abs(old - new).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_pruned_model_is_pruned_again(tmp_path):
    report = prune(
        pruned()[0],
        tmp_path / "model",
        2,
        "greedy",
        data=f"text@{tiny_config().data.path}",
        n_tokens=2000,
    )
    assert report["step"] == STEPS and read_config(tmp_path / "model").experts.n_experts == 2
    assert contents(tmp_path / "model").keys() == contents(pruned()[0]).keys()
    before, after = (
        load_model(folder).params["layers"]["experts"]
        for folder in (pruned()[0], tmp_path / "model")
    )
    for layer, of_layer in enumerate(report["layers"]):
        kept = [cluster["reference"] for cluster in of_layer["clusters"]]
        assert sorted(kept) == sorted(np.argsort(of_layer["load"])[1:])
        np.testing.assert_array_equal(
            after["w_gate_up"][layer], before["w_gate_up"][layer, np.array(kept)]
        )


MISTAKES = {
    "no number": (["--output={here}/model"], ["--experts is missing"]),
    "too many": (
        ["--output={here}/model", "--experts=4"],
        ["--experts=4: must be at least experts.top_k=2 and fewer"],
    ),
    "method": (
        ["--output={here}/model", "--experts=2", "--method=best"],
        ["uncurl|frequency_merge|greedy"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    flags, words = MISTAKES[mistake]
    command = [
        *MODULE,
        f"--workdir={finished_run()}",
        *(flag.format(here=tmp_path) for flag in flags),
    ]
    status, _, stderr = run(command)
    assert status == 2 and "Traceback" not in stderr, stderr
    for word in words:
        assert word in stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())

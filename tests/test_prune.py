"""A run is pruned to a model with fewer experts, which is evaluated, trained and pruned again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from aoe_jax.conversion.pruning import check_prunes, prune
from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.loading import read_config, read_step
from tests.conversion.models import model_of
from tests.evaluation.models import make_config
from tests.in_process import call
from tests.runs import (
    STEPS,
    as_read_from,
    contents,
    corpus_store,
    fine_tuned,
    finished_run,
    kind_run,
    read_metrics,
    run,
    scratch,
    shared,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("ragged")


@shared
def pruned():
    """Prunes a run from 4 experts to 3; returns `(directory, stdout)`."""
    directory = scratch("pruned") / "aoe"
    command = ["-m", "aoe_jax.prune", f"--workdir={finished_run()}", f"--output={directory}"]
    status, stdout, stderr = run([*command, "--experts=3"])
    assert status == 0, stderr
    return directory, stdout


def test_files():
    directory, stdout = pruned()
    experts = dataclasses.replace(tiny_config().experts, n_experts=3)
    pruned_config = dataclasses.replace(tiny_config(), experts=experts)
    assert read_config(directory) == as_read_from(directory, pruned_config)
    assert read_step(directory) == STEPS
    names = {"aoe_jax.json", "config.json", "data.json", "generation_config.json", "prune.json"}
    names |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert contents(directory).keys() == names | {"configuration_aoe.py", "modeling_aoe.py"}
    report = json.loads((directory / "prune.json").read_text())
    assert report["nll"].keys() == {"before", "after"} and report["method"] == "uncurl"
    assert f"after {report['nll']['after']:.4f}" in stdout.splitlines()[-1]
    assert "4 experts of a layer became 3 by `uncurl`" in (directory / "README.md").read_text()
    rows = stdout.splitlines()[-3:-1]
    for number, (layer, row) in enumerate(zip(report["layers"], rows, strict=True)):
        share, clusters = np.array(layer["load"]) / 2, layer["clusters"]
        cells = [str(number), f"{layer['load_entropy']:.3f}", f"{layer['load_entropy_after']:.3f}"]
        for cluster in clusters:
            members = cluster["members"]
            cells += ["+".join(map(str, members)), f"{share[members].sum():.1%}"]
        assert row.split() == cells and len(clusters) == 3
        assert sorted(m for cluster in clusters for m in cluster["members"]) == list(range(4))


def test_a_pruned_model_is_evaluated(tmp_path):
    directory = shutil.copytree(pruned()[0], tmp_path / "model")
    report = evaluate_workdir(directory, "validation", data=f"prepared@{corpus_store()}")
    nll = json.loads((directory / "prune.json").read_text())["nll"]
    np.testing.assert_allclose(report["nll"], nll["after"], rtol=1e-5)
    of_run = read_metrics(finished_run())[1][-1]["validation_nll"]
    np.testing.assert_allclose(nll["before"], of_run, rtol=1e-5)


@pytest.mark.slow
def test_a_router_is_trained_alone(tmp_path):
    """All other parameters are bit-identical to those of the pruned model."""
    directory, router = tmp_path / "model", kind_run("router")[0]
    prune(router, directory, 3, "frequency_merge", n_tokens=2000)
    assert json.loads((directory / "config.json").read_text())["model_type"] == "mixtral"
    status, _, stderr = run(fine_tuned(directory, tmp_path / "run", **{"train.router_steps": 4}))
    assert status == 0, stderr
    folders = directory, tmp_path / "run"
    before, after = (jax.device_get(load_model(folder).params) for folder in folders)
    old, new = (params["layers"]["experts"].pop("w_router") for params in (before, after))
    assert old.shape == (2, 32, 3) and np.abs(old - new).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_pruned_model_is_pruned_again(tmp_path):
    data, again = f"text@{tiny_config().data.path}", tmp_path / "model"
    report = prune(pruned()[0], again, 2, "greedy", data=data, n_tokens=2000)
    assert report["step"] == STEPS and read_config(again).experts.n_experts == 2
    assert contents(again).keys() == contents(pruned()[0]).keys()
    folders = pruned()[0], again
    before, after = (load_model(folder).params["layers"]["experts"] for folder in folders)
    for layer, of_layer in enumerate(report["layers"]):
        kept = [cluster["reference"] for cluster in of_layer["clusters"]]
        assert sorted(kept) == sorted(np.argsort(of_layer["load"])[1:])
        of_kept = before["w_gate_up"][layer, np.array(kept)]
        np.testing.assert_array_equal(after["w_gate_up"][layer], of_kept)


LARGE = {"experts__kind": "router", "experts__large_router": True}
OTHERS = {"routing__name": "threshold"}, {"experts__kind": "uoe"}, {"experts__kind": "dense"}
REFUSED = [
    *((changes, 2, "': pruning is not implemented; use a model with top_k") for changes in OTHERS),
    ({"experts__score_neurons": 4}, 2, "experts.score_neurons=4: merging reorders the neurons"),
    (LARGE, 2, "because its width depends on the experts"),
    ({}, 1, "--experts=1: must be at least experts.top_k=2 and fewer than the 4"),
    ({}, 4, "--experts=4: must be at least experts.top_k=2 and fewer than the 4"),
    ({"mesh__expert": 2}, 3, "--experts=3: must be a multiple of mesh.expert=2; --mesh changes"),
]


@pytest.mark.parametrize(("changes", "n_experts", "words"), REFUSED)
def test_models_that_are_refused(changes, n_experts, words):
    model = dataclasses.replace(model_of("aoe"), config=make_config(**changes))
    with pytest.raises(UserError) as error:
        check_prunes(model, n_experts, "DIR")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--experts is missing"),
        (["--experts=2", "--data=text@/no/such/folder"], "--data=text@/no/such/folder: "),
        (["--experts=2", "--data=sotu=much"], "--data=sotu=much: "),
        (["--experts=2", "--output={here}"], "--output=.* exists already"),
    ],
)
def test_mistakes(tmp_path, flags, words):
    (tmp_path / "precious").touch()
    flags = [f"--output={tmp_path}/model", *(flag.format(here=tmp_path) for flag in flags)]
    with pytest.raises(UserError, match=words):
        call("aoe_jax.prune", f"--workdir={finished_run()}", *flags)
    assert contents(tmp_path).keys() == {"precious"}

"""A run is exported as a model, and commands convert, evaluate and train the model."""

import json
import shutil

import jax
import numpy as np
import pytest

from aoe_jax.config.training import TrainConfig
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import DivergedError, UserError
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.evaluation.models import corpus_of, load_model
from aoe_jax.formats.loading import read_config, read_step
from aoe_jax.formats.model_card import training
from aoe_jax.storage.files import write_json
from tests.formats.test_loading import edit
from tests.formats.test_tokenizer_files import with_a_first_token
from tests.in_process import call
from tests.runs import (
    STEPS,
    as_read_from,
    contents,
    corpus_folder,
    corpus_store,
    fine_tuned,
    finished_run,
    kind_config,
    kind_run,
    read_metrics,
    run,
    scratch,
    shared,
    succeed,
    tiny_config,
    train_command,
)

pytestmark = pytest.mark.usefixtures("ragged")


@shared
def exported():
    """Returns `{kind: directory}` of exported models. `converted` is the AoE that is made from the
    router MoE.
    """
    runs = {"aoe": finished_run(), "router": kind_run("router")[0]}
    found = {kind: scratch("exported") / kind for kind in (*runs, "converted")}
    for kind, workdir in runs.items():
        call("aoe_jax.export", f"--workdir={workdir}", f"--output={found[kind]}")
    models = f"--checkpoint={found['router']}", f"--output={found['converted']}"
    status, stdout, stderr = run(["-m", "aoe_jax.convert", *models, "--d_low=16"])
    assert status == 0, stderr
    assert "energy kept: 0." in stdout
    return found


def test_files():
    for kind, config in {"aoe": tiny_config(), "router": kind_config("router")}.items():
        assert read_config(exported()[kind]) == as_read_from(exported()[kind], config)
    assert read_step(exported()["aoe"]) == STEPS
    names = {"aoe_jax.json", "config.json", "data.json", "generation_config.json", "README.md"}
    names |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    classes = {"configuration_aoe.py", "modeling_aoe.py"}
    others = {"aoe": classes, "router": set(), "converted": classes | {"convert.json"}}
    for kind, architecture in {"aoe": "aoe", "router": "mixtral", "converted": "aoe"}.items():
        directory = exported()[kind]
        assert contents(directory).keys() == names | others[kind]
        assert json.loads((directory / "config.json").read_text())["model_type"] == architecture
        assert contents(directory)["tokenizer.json"] == contents(finished_run())["tokenizer.json"]


def test_model_cards(tmp_path):
    """Model cards have results of the run or the conversion, the corpora, and code for loading."""
    for data, is_told in ((None, True), ("text@/elsewhere", False)):
        write_json(tmp_path / "eval.json", {"split": "test", "data": data, "step": 2, "nll": 1.25})
        assert ("1.2500" in training(tiny_config(), tmp_path, 2)) == is_told
    cards = {kind: (folder / "README.md").read_text() for kind, folder in exported().items()}
    metrics = json.loads((finished_run() / "summary.json").read_text())["metrics"]
    assert f"{metrics['validation_nll']:.4f}" in cards["aoe"]
    assert f"{STEPS:,} steps" in cards["aoe"] and str(scratch("texts")) not in cards["aoe"]
    assert "from_pretrained(DIR)" in cards["router"]
    for kind in ("aoe", "converted"):
        assert cards[kind].count("from_pretrained(DIR, trust_remote_code=True)") == 2
    made = f"made this model of `router` (step {read_step(exported()['router'])})"
    assert made in cards["converted"] and "energy kept: 0." in cards["converted"]


def test_a_model_is_that_of_its_run():
    model, of_run = load_model(exported()["aoe"]), load_model(finished_run())
    assert model.config == as_read_from(exported()["aoe"], of_run.config)
    assert (model.step, model.start) == (of_run.step, of_run.start)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (model.params, of_run.params)))


def test_a_model_does_not_choose_the_size_of_a_batch(tmp_path):
    """A model does not choose the mesh either, because a stranger may have written its files."""
    directory = shutil.copytree(exported()["aoe"], tmp_path / "model")
    values = json.loads((directory / "aoe_jax.json").read_text())
    values["config"]["train"] |= {"batch_size": 2**25, "accumulate": 1}
    values["config"]["mesh"] |= {"data": 4, "fsdp": 2}
    values["config"]["train"]["eval_every"] = values["config"]["checkpoint"]["keep_best"] = 1
    write_json(directory / "aoe_jax.json", values)
    assert read_config(directory).train == TrainConfig()
    nll = evaluate_workdir(directory, "validation", data=f"prepared@{corpus_store()}")["nll"]
    of_run = read_metrics(finished_run())[1][-1]["validation_nll"]
    assert nll == pytest.approx(of_run, rel=1e-4)


def test_a_model_does_not_choose_its_corpus():
    directory = exported()["aoe"]
    with pytest.raises(UserError, match="which cannot choose what is read here; its run read"):
        corpus_of(load_model(directory), directory)


def test_parameters_that_are_not_finite(tmp_path):
    directory = shutil.copytree(exported()["aoe"], tmp_path / "model")
    name = "model.layers.1.self_attn.v_proj.weight"
    edit(directory, **{name: np.full((32, 32), np.nan, np.float32)})
    with pytest.raises(DivergedError, match="the parameter layers/attention/v has values that are"):
        load_model(directory)


EXPORT = ["aoe_jax.export", "--workdir={run}", "--output={here}/model"]
CONVERT = ["aoe_jax.convert", "--checkpoint={router}", "--output={here}/model"]
UPCYCLE = [*CONVERT, "--upcycle=moe", "--experts=4", "--top_k=2"]
ONE_OF = "--score_neurons and --d_low: give one of them, or --upcycle"
MISTAKES = [
    ([*EXPORT, "--step=7"], "--step=7.*has checkpoints of steps"),
    ([*EXPORT, "--workdir={here}"], r"config\.json cannot be read"),
    ([*EXPORT, "--workdir={aoe}"], "belongs to a model, not to a training"),
    (["aoe_jax.eval", "--workdir={aoe}", "--step=7"], f"--step=7.*single model, of step {STEPS}"),
    (CONVERT, ONE_OF),
    ([*CONVERT, "--score_neurons=4", "--d_low=8"], ONE_OF),
    ([*CONVERT, "--d_low=8", "--score=max"], "--score=max.*--score_neurons"),
    ([*CONVERT, "--d_low=8", "--experts=4"], "--experts=4: belongs to --upcycle"),
    ([*CONVERT, "--d_low=8", "--tokens=9"], "--tokens=9: belongs to --score_neurons or --data"),
    ([*CONVERT, "--upcycle=moe", "--top_k=2"], "--experts is missing"),
    ([*UPCYCLE, "--score_neurons=4"], "--score_neurons=4: belongs to --upcycle=aoe"),
    ([*UPCYCLE, "--upcycle=aoe", "--seed=1"], "--seed=1: belongs to --noise or --upcycle=moe"),
    ([*UPCYCLE, "--d_low=4"], "--d_low=4: gates stay whole with --upcycle"),
    ([*UPCYCLE, "--tokens=9"], "--tokens=9: belongs to --data or the workdir of a run"),
    (UPCYCLE, r"experts\.kind='router': only a dense model can be upcycled"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES)
def test_mistakes(tmp_path, command, words):
    (tmp_path / "here").mkdir()
    places = {"run": finished_run(), "here": tmp_path / "here", **exported()}
    with pytest.raises(UserError, match=words):
        call(*(word.format(**places) for word in command))
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_an_exported_model_takes_the_token_store_of_its_run(tmp_path):
    """The tokenizer adds tokens to texts, as that of Llama 3 does, and its exported copy does not.
    The vocabulary is that of the store.
    """
    run_folder, model, store = (tmp_path / name for name in ("run", "model", "store"))
    with_a_first_token(tmp_path)
    texts = [f"--input={corpus_folder()}", f"--tokenizer={tmp_path}", f"--output={store}"]
    call("aoe_jax.prepare", *texts)
    short = {"train__steps": 4, "train__warmup": 0.25, "experts__kind": "router"}
    data = {"data__name": "prepared", "data__path": store, "model__vocab_size": None}
    succeed(train_command(run_folder, **short, **data))
    vocab_size = load_tokenizer(tmp_path).token_count
    assert json.loads((run_folder / "config.json").read_text())["model"]["vocab_size"] == vocab_size
    call("aoe_jax.export", f"--workdir={run_folder}", f"--output={model}")
    assert load_tokenizer(model).prefix == [] != load_tokenizer(store).prefix
    succeed(fine_tuned(model, tmp_path / "tuned", **{"data.name": "prepared", "data.path": store}))
    own, nll = [f"--data=prepared@{store}"], {}
    for folder, given in ((run_folder, []), (model, own)):
        call("aoe_jax.eval", f"--workdir={folder}", *given)
        nll[folder] = json.loads((folder / "eval.json").read_text())["nll"]
    assert nll[model] == pytest.approx(nll[run_folder], rel=1e-6)
    own += ["--tokens=500"]
    call("aoe_jax.prune", f"--workdir={model}", "--experts=2", f"--output={model}2", *own)
    to_aoe = [f"--checkpoint={model}", "--score_neurons=4", f"--output={model}3"]
    call("aoe_jax.convert", *to_aoe, *own)


def test_a_model_without_a_run_has_no_corpus(tmp_path):
    directory = shutil.copytree(exported()["aoe"], tmp_path / "model")
    (directory / "aoe_jax.json").unlink()
    (directory / "data.json").unlink()
    with pytest.raises(UserError, match="it has no training run. Name corpora with --data"):
        evaluate_workdir(directory)

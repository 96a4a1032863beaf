"""Dense models made into MoE and AoE: what they compute, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from aoe_jax.conversion.upcycling import Upcycling, upcycle
from aoe_jax.errors import UserError
from aoe_jax.formats.loading import ModelReader, read_config
from aoe_jax.moe.routing import TopK
from aoe_jax.moe.swiglu import single_expert
from benchmarks.parity import logits_here, logits_there, random_model, save
from tests.formats.test_writing import written
from tests.in_process import call
from tests.runs import kind_run, tiny_config

TOKENS = np.random.default_rng(1).integers(0, 512, (4, 48))
EXACT = {
    "copies": Upcycling("moe", 4, 2),
    "copies of pieces": Upcycling("moe", 12, 6, granularity=3),
    "whole gates": Upcycling("aoe", 4, 3, score_neurons=6),
    "whole gates, max": Upcycling("aoe", 4, 2, score_neurons=2, score="max"),
}


def slow(form):
    return pytest.param(form, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "form", ["copies of pieces", "whole gates", slow("copies"), slow("whole gates, max")]
)
def test_the_result_computes_what_the_dense_model_does(tmp_path, form):
    dense, output, form = (
        dense_model(tmp_path, model__qk_norm="head"),
        tmp_path / "moe",
        EXACT[form],
    )
    report = upcycle(dense, output, form)
    assert json.loads((output / "convert.json").read_text()) == report
    assert "nll" not in report  # without a corpus
    logits = logits_here(dense, TOKENS)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits_here(output, TOKENS), logits, rtol=0, atol=2e-5)
    config = read_config(output)
    e = config.experts
    assert (e.kind, e.n_experts, e.top_k, e.d_ffn, e.score_neurons) == (
        "aoe" if form.kind == "aoe" else "router",
        form.n_experts,
        form.top_k,
        24 // form.granularity,
        form.score_neurons,
    )
    assert config.routing == TopK() and config.balance.aux_weight > 0
    model_type = json.loads((output / "config.json").read_text())["model_type"]
    assert model_type == ("aoe" if form.kind == "aoe" else "qwen3_moe")


def dense_model(folder, dtype="float32", **changes):
    """The directory of a dense model of width 24, a Llama or a Qwen3."""
    config = tiny_config(experts__kind="dense", experts__d_ffn=24, **changes)
    return written(folder, config, dtype)[0]


def layer_of(directory, layer=1):
    reader = ModelReader(directory, read_config(directory))
    paths = [path for path in reader.parameters if path.startswith("layers/experts/")]
    return {path.rpartition("/")[2]: reader.layer(path, layer) for path in paths}


@pytest.mark.parametrize("kind", ["moe", "aoe"])
def test_pieces_of_the_dense_layer(tmp_path, kind):
    """The experts of a copy sum to G times the dense layer; all neurons that score are distinct."""
    folder = dense_model(tmp_path)
    form = Upcycling(kind, 6, 3, granularity=3, score_neurons=4 if kind == "aoe" else None)
    upcycle(folder, tmp_path / "moe", form)
    dense, experts = layer_of(folder), layer_of(tmp_path / "moe")
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for copy in (slice(0, 3), slice(3, 6)):
        pieces = [{n: w[i] for n, w in experts.items() if n != "w_router"} for i in range(6)[copy]]
        total = sum(np.asarray(single_expert(x, piece)) for piece in pieces)
        np.testing.assert_allclose(total / 3, single_expert(x, dense), rtol=1e-4, atol=1e-5)
    if kind == "aoe":
        first = np.concatenate(list(experts["w_gate"][..., :4]), axis=1)
        columns = {tuple(column) for column in first.T}
        assert len(columns) == 24 and columns == {tuple(column) for column in dense["w_gate"].T}
    else:
        router = experts["w_router"]
        np.testing.assert_array_equal(router[:, 0], router[:, 2])
        assert (router[:, 2] != router[:, 3]).all()
        assert np.std(router) == pytest.approx(32**-0.5, rel=0.4)


def test_noise(tmp_path):
    """It has the standard deviation that was asked for, differs between experts, and depends on
    the seed alone.
    """
    folder, found = dense_model(tmp_path), {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        upcycle(folder, tmp_path / name, Upcycling("moe", 4, 2, noise=0.1, seed=seed))
        found[name] = layer_of(tmp_path / name)
    upcycle(folder, tmp_path / "exact", Upcycling("moe", 4, 2))
    dense, exact = layer_of(folder), layer_of(tmp_path / "exact")
    for name in ("w_gate", "w_up", "w_down"):
        difference = found["a"][name] - exact[name]
        assert difference.std() == pytest.approx(0.1 * dense[name].std(), rel=0.05)
        assert abs(np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]) < 0.2
        np.testing.assert_array_equal(found["a"][name], found["b"][name])
        assert (found["a"][name] != found["c"][name]).mean() > 0.99
    assert (found["a"]["w_router"] != found["c"]["w_router"]).all()


def test_parameters_keep_their_dtype(tmp_path):
    upcycle(dense_model(tmp_path, "bfloat16"), tmp_path / "moe", Upcycling("moe", 4, 2, noise=0.1))
    stored = load_file(tmp_path / "moe/model.safetensors")
    assert {a.dtype.name for a in stored.values()} == {"bfloat16"}
    assert read_config(tmp_path / "moe").model.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.usefixtures("ragged")
def test_a_run_by_the_command_line(tmp_path, capsys):
    """The nll of the run is that of the upcycled model."""
    workdir, aoe = kind_run("dense")[0], tmp_path / "aoe"
    sizes = ["--upcycle=aoe", "--experts=4", "--top_k=2", "--score_neurons=4"]
    call("aoe_jax.convert", f"--checkpoint={workdir}", f"--output={aoe}", *sizes)
    stdout = capsys.readouterr().out
    report = json.loads((aoe / "convert.json").read_text())
    assert report["nll"]["after"] == pytest.approx(report["nll"]["before"], abs=1e-5)
    nll = f"{report['nll']['before']:.4f}"
    assert f"nll: {nll} before, {report['nll']['after']:.4f} after; wrote {aoe}" in stdout
    card = (aoe / "README.md").read_text()
    assert f"`python -m aoe_jax.convert --upcycle=aoe` made this model of `{workdir.name}`" in card
    assert f"2 of 4 experts of granularity 1; nll: {nll} before" in card
    of_run = json.loads((workdir / "summary.json").read_text())["metrics"]["validation_nll"]
    assert report["nll"]["before"] == pytest.approx(of_run, abs=0.2)


REFUSED = [
    (Upcycling("moe", 2, 3), "--top_k=3: must be at most --experts=2"),
    (
        Upcycling("moe", 4, 3, granularity=3),
        "--granularity=3: must divide --experts=4 and the width 24",
    ),
    (
        Upcycling("moe", 5, 5, granularity=5),
        "--granularity=5: must divide --experts=5 and the width 24",
    ),
    (Upcycling("moe", 8, 3, granularity=2), "--top_k=3: must be a multiple of --granularity=2"),
    (
        Upcycling("aoe", 4, 2),
        "--score_neurons=None: must be at most 6, so that each of 4 experts has its own of 24",
    ),
    (
        Upcycling("aoe", 4, 2, score_neurons=7),
        "--score_neurons=7: must be at most 6, so that each of 4 experts has its own of 24",
    ),
]


@pytest.mark.parametrize(("form", "words"), REFUSED)
def test_refused_by_name(tmp_path, form, words):
    with pytest.raises(UserError, match=words):
        upcycle(dense_model(tmp_path), tmp_path / "moe", form)
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
def test_transformers_computes_a_mixtral_with_the_factors_of_llama_3(tmp_path):
    save(random_model("llama", attention_bias=False), tmp_path / "dense", "fused")
    upcycle(tmp_path / "dense", tmp_path / "model", EXACT["copies"])
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["model_type"] == "mixtral" and config["rope_scaling"]["rope_type"] == "longrope"
    expected = logits_there(tmp_path / "dense")
    np.testing.assert_allclose(logits_there(tmp_path / "model"), expected, rtol=0, atol=1e-4)

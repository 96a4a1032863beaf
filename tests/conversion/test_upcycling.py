"""Dense models made into MoE and AoE: what they compute, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from aoe_jax.conversion.upcycling import Upcycling, upcycle
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.loading import read_config
from aoe_jax.moe.routing import TopK
from aoe_jax.moe.swiglu import single_expert
from benchmarks.parity import logits_here, logits_there, random_model, save
from tests.conversion.models import experts_of, source
from tests.evaluation.models import WORDS
from tests.in_process import call
from tests.runs import kind_run

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
    dense, output = dense_model(tmp_path, model__qk_norm="head"), tmp_path / "moe"
    form = EXACT[form]
    report = upcycle(dense, output, form)
    assert json.loads((output / "convert.json").read_text()) == report
    assert "nll" not in report  # without a corpus
    logits = logits_here(dense, TOKENS)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits_here(output, TOKENS), logits, rtol=0, atol=2e-5)
    config = read_config(output)
    e = config.experts
    assert e.kind == ("aoe" if form.kind == "aoe" else "router")
    assert (e.n_experts, e.top_k, e.score_neurons) == (
        form.n_experts,
        form.top_k,
        form.score_neurons,
    )
    assert e.d_ffn == 24 // form.granularity
    assert config.routing == TopK() and config.balance.aux_weight > 0
    model_type = json.loads((output / "config.json").read_text())["model_type"]
    assert model_type == ("aoe" if form.kind == "aoe" else "qwen3_moe")


def dense_model(folder, **changes):
    """The directory of a dense model of width 24, a Llama or a Qwen3."""
    return source(folder, experts__kind="dense", experts__d_ffn=24, **changes)


@pytest.mark.parametrize("kind", ["moe", "aoe"])
def test_pieces_of_the_dense_layer(tmp_path, kind):
    """The experts of a copy sum to G times the dense layer; all neurons that score are distinct."""
    folder = dense_model(tmp_path)
    form = Upcycling(kind, 6, 3, granularity=3, score_neurons=4 if kind == "aoe" else None)
    upcycle(folder, tmp_path / "moe", form)
    dense, experts = experts_of(folder, 1), experts_of(tmp_path / "moe", 1)
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
    the seed alone; parameters keep their dtypes.
    """
    dense = experts_of(dense_model(tmp_path), 1)
    exact = Upcycling("moe", 4, 2).experts(1, dense)
    first, again, other = (
        Upcycling("moe", 4, 2, noise=0.1, seed=seed).experts(1, dense) for seed in (0, 0, 1)
    )
    for name in ("w_gate", "w_up", "w_down"):
        difference = first[name] - exact[name]
        assert difference.std() == pytest.approx(0.1 * dense[name].std(), rel=0.05)
        assert abs(np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]) < 0.2
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).mean() > 0.99
    assert (first["w_router"] != other["w_router"]).all()
    narrow = {name: a.astype(ml_dtypes.bfloat16) for name, a in dense.items()}
    experts = Upcycling("moe", 4, 2, noise=0.1).experts(1, narrow)
    assert {a.dtype.name for a in experts.values()} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.usefixtures("ragged", "one_device")
def test_a_run_by_the_command_line(tmp_path, capsys):
    """The nll of the run is that of the upcycled model."""
    workdir, aoe = kind_run("dense")[0], tmp_path / "aoe"
    sizes = ["--upcycle=aoe", "--experts=4", "--top_k=2", "--score_neurons=4"]
    call("aoe_jax.convert", f"--checkpoint={workdir}", f"--output={aoe}", *sizes)
    stdout = capsys.readouterr().out
    report = json.loads((aoe / "convert.json").read_text())
    assert report["nll"]["after"] == pytest.approx(report["nll"]["before"], abs=1e-5)
    nll = f"nll: before {report['nll']['before']:.4f}, after {report['nll']['after']:.4f}"
    assert f"{nll}; wrote {aoe}" in stdout and nll in (aoe / "README.md").read_text()
    of_run = json.loads((workdir / "summary.json").read_text())["metrics"]["validation_nll"]
    assert report["nll"]["before"] == pytest.approx(of_run, abs=0.2)


EACH_ITS_OWN = "must be at most 6, because 4 experts divide a layer of width 24"
REFUSED = [
    (Upcycling("moe", 2, 3), "--top_k=3: must be at most --experts=2"),
    (Upcycling("moe", 4, 3, 3), "--granularity=3: must divide --experts=4 and the width 24"),
    (Upcycling("moe", 5, 5, 5), "--granularity=5: must divide --experts=5 and the width 24"),
    (Upcycling("moe", 8, 3, 2), "--top_k=3: must be a multiple of --granularity=2"),
    (Upcycling("aoe", 4, 2), f"--score_neurons=None: {EACH_ITS_OWN}"),
    (Upcycling("aoe", 4, 2, score_neurons=7), f"--score_neurons=7: {EACH_ITS_OWN}"),
]


@pytest.mark.parametrize(("form", "words"), REFUSED)
def test_refused_by_name(tmp_path, form, words):
    with pytest.raises(UserError, match=words):
        upcycle(dense_model(tmp_path), tmp_path / "moe", form)
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
def test_transformers_computes_a_mixtral_with_the_factors_of_llama_3(tmp_path):
    save(random_model("llama", attention_bias=False), tmp_path / "dense", "fused")
    train_tokenizer(WORDS, 280).save(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "model", EXACT["copies"])
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["model_type"] == "mixtral" and config["rope_scaling"]["rope_type"] == "longrope"
    expected = logits_there(tmp_path / "dense")
    np.testing.assert_allclose(logits_there(tmp_path / "model"), expected, rtol=0, atol=1e-4)

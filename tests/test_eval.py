"""The table and files of eval.py. Its nll equals the nll by definition."""

import json
import math
import shutil

import jax
import matplotlib.image
import numpy as np
import pytest
import scipy.special

from aoe_jax.config.run import Config
from aoe_jax.conversion.observations import observations
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.evaluation.models import corpus_of, first_batches, load_model
from aoe_jax.model.decoder import Decoder
from benchmarks.precision import chosen
from tests.runs import STEPS, contents, finished_run, kind_run, run, scratch, shared


@shared
def evaluated():
    """Evaluates the default split, the test split; returns `(workdir, stdout, eval.json)`."""
    workdir = shutil.copytree(finished_run(), scratch("evaluated") / "run")
    status, stdout, stderr = run(["eval.py", f"--workdir={workdir}"])
    assert status == 0, stderr
    return workdir, stdout, json.loads((workdir / "eval.json").read_text())


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["aoe", "dense"])
def test_validation_is_that_of_training(kind, tmp_path, capsys, ragged):
    source = finished_run() if kind == "aoe" else kind_run(kind)[0]
    workdir = shutil.copytree(source, tmp_path / "run")
    report = evaluate_workdir(workdir, "validation")
    summary = json.loads((workdir / "summary.json").read_text())["metrics"]
    assert (report["split"], report["step"]) == ("validation", summary["step"])
    for name in ("nll", "bits_per_byte"):
        assert report[name] == pytest.approx(summary[f"validation_{name}"], rel=1e-6)
    assert report["perplexity"] == pytest.approx(math.exp(report["nll"]), rel=1e-9)
    is_dense = kind == "dense"
    assert is_dense == (report["load_statistics"] is None)
    assert is_dense == ("Ent_load" not in capsys.readouterr().out)
    assert is_dense != (workdir / "load.png").exists()


def test_table():
    _, stdout, report = evaluated()
    assert (report["split"], report["step"]) == ("test", STEPS)
    assert f"test: {report['tokens']} tokens" in stdout
    assert f"nll {report['nll']:.4f}" in stdout and f"{report['bits_per_byte']:.4f}" in stdout
    statistics = report["load_statistics"]
    load = np.array(statistics["load"])
    assert load.shape == (2, 4) == np.array(statistics["mean_score"]).shape
    np.testing.assert_allclose(load.sum(axis=1), 2, rtol=1e-6)
    np.testing.assert_allclose(statistics["experts_per_token"], 2, rtol=1e-6)
    share = load / 2
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=1)
    np.testing.assert_allclose(statistics["load_entropy"], entropy, rtol=1e-5)
    for layer in range(2):
        row = next(line for line in stdout.splitlines() if line.split()[:1] == [str(layer)])
        cells = [float(cell.rstrip("%")) for cell in row.split()[-4:]]
        assert cells == pytest.approx(100 * share[layer], abs=0.051)
        assert float(row.split()[1]) == pytest.approx(entropy[layer], abs=6e-4)


def test_only_its_own_files_are_written():
    workdir = evaluated()[0]
    before, after = contents(finished_run()), contents(workdir)
    assert after.keys() - before.keys() == {"eval.json", "load.png"}
    assert all(after[name] == content for name, content in before.items())
    height, width, _ = matplotlib.image.imread(workdir / "load.png").shape
    assert width > 200 and height > 100


def test_nll_is_exact(ragged):
    """The expected nll is computed from logits in float64, one window at a time without padding."""
    workdir, _, report = evaluated()
    config = Config.from_stored(json.loads((workdir / "config.json").read_text()))
    (store,) = open_corpus(config.data, config.model.vocab_size).test.values()
    tokens, params = store.read(0, len(store)), jax.device_get(load_model(workdir).params)
    apply = jax.jit(lambda inputs: Decoder.from_config(config).apply({"params": params}, inputs)[0])
    total, length = 0.0, config.data.seq_len
    for begin in range(0, len(tokens) - 1, length):
        window = tokens[begin : begin + length + 1]
        logits = np.asarray(apply(window[None, :-1])[0], np.float64)
        chosen = logits[np.arange(len(window) - 1), window[1:]]
        total += (scipy.special.logsumexp(logits, axis=1) - chosen).sum()
    assert report["tokens"] == len(tokens) - 1
    assert report["tokens"] % (length * config.train.batch_size)  # the last batch is padded
    np.testing.assert_allclose(report["nll"], total / (len(tokens) - 1), rtol=1e-5)
    bits = total / math.log(2) / store.text_bytes
    np.testing.assert_allclose(report["bits_per_byte"], bits, rtol=1e-5)


@pytest.mark.slow
def test_dropped_choices_are_in_the_table(tmp_path, capsys):
    workdir = shutil.copytree(kind_run("capacity")[0], tmp_path / "run")
    dropped = evaluate_workdir(workdir, "validation")["load_statistics"]["dropped_share"]
    lines = capsys.readouterr().out.splitlines()
    for layer, share in enumerate(dropped):
        row = next(line for line in lines if line.split()[:1] == [str(layer)])
        assert share > 0
        assert float(row.split()[3].rstrip("%")) == pytest.approx(100 * share, abs=0.006)


@pytest.mark.slow
def test_compression_benchmark(tmp_path):
    """The benchmark reports the bits per byte of eval.py, and those of xz for the same text."""
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    bits = evaluate_workdir(workdir, "validation")["bits_per_byte"]
    flags = [f"--workdir={workdir}", f"--json={tmp_path}/figures.json"]
    status, stdout, stderr = run(["-m", "benchmarks.compression", *flags])
    assert status == 0, stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model_bits_per_byte"] == bits and 0 < figures["xz_bits_per_byte"] < 8
    assert figures["ratio"] * figures["xz_bits_per_byte"] == pytest.approx(bits)
    assert f"ratio {figures['ratio']:.3f}" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_precision_benchmark(kind, tmp_path):
    """In float32 the benchmark chooses as the model does; in bfloat16 it nearly does."""
    workdir = finished_run() if kind == "aoe" else kind_run(kind)[0]
    flags = [f"--workdir={workdir}", "--tokens=512", f"--json={tmp_path}/figures.json"]
    status, stdout, stderr = run(["-m", "benchmarks.precision", *flags])
    assert status == 0, stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0.95 < min(figures["layers"]) <= figures["mean"] <= 1
    assert f"{figures['mean']:.4%} of {figures['tokens']} tokens' choices are equal" in stdout

    model = load_model(workdir)
    batches = first_batches(model, corpus_of(model, workdir).validation.values(), 512)
    for _, expected, x in observations(model, batches, with_inputs=True):
        for layer, own in enumerate(expected):
            weights = {k: a[layer] for k, a in model.params["layers"]["experts"].items()}
            assert np.array_equal(chosen(x[layer], weights, model.config.experts), own)

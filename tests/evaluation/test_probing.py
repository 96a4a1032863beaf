"""The table of probes of a real run: its own figures are those of `eval.py`, and it is written and
printed.
"""

import dataclasses
import json

import numpy as np
import pytest

from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation import probing
from aoe_jax.evaluation.evaluate import evaluate_workdir
from benchmarks.parity import random_model, save
from tests.evaluation.models import make_config, make_model
from tests.in_process import call
from tests.runs import corpus_folder, finished_run, kind_run

pytestmark = pytest.mark.usefixtures("ragged")


@pytest.fixture
def few_probes(monkeypatch):
    """The router, chance, and one norm: each probe is a program of its own to compile."""
    monkeypatch.setattr(probing, "PROBES", dict(list(probing.PROBES.items())[:3]))


def test_the_command(tmp_path, monkeypatch):
    """The router alone scores as in training; a random choice has equal weights only."""
    monkeypatch.setattr(probing, "PROBES", dict(list(probing.PROBES.items())[:2]))
    workdir = kind_run("router")[0]
    flags = [f"--output={tmp_path}", "--tokens=1000000000"]
    call("aoe_jax.probe", f"--checkpoint={workdir}", *flags)
    router, chance = json.loads((tmp_path / "probe.json").read_text())["probes"]
    of_run = json.loads((workdir / "summary.json").read_text())["metrics"]["validation_nll"]
    assert router["nll"]["softmax"] == pytest.approx(of_run, rel=1e-5)
    assert (router["agreement"], router["time"]) == (1.0, 1.0)
    assert 0.3 < chance["agreement"] < 0.9 and chance["nll"].keys() == {"equal"}


@pytest.mark.slow
def test_the_table_of_a_run(tmp_path, few_probes, capsys):
    workdir = kind_run("router")[0]
    report = probing.probe_checkpoint(workdir, tmp_path, n_tokens=10**9, score_neurons=4)
    assert report == json.loads((tmp_path / "probe.json").read_text())
    whole = evaluate_workdir(workdir, "validation")
    router, chance, norm, *first = report["probes"]
    assert [(p["node"], p["norm"]) for p in first] == [("x Wg[:, :4]", s) for s in ("norm", "max")]
    np.testing.assert_allclose(router["nll"]["softmax"], whole["nll"], rtol=1e-5)
    assert (report["tokens"], report["step"]) == (whole["tokens"], whole["step"])
    assert (router["agreement"], router["time"], norm["node"], norm["norm"]) == (
        1.0,
        1.0,
        "x Wg",
        "L1",
    )
    assert all(0.3 < probe["agreement"] < 0.9 and probe["time"] > 0 for probe in (chance, norm))
    assert chance["nll"].keys() == {"equal"} and norm["nll"].keys() == {"softmax", "equal"}
    nll = [value for probe in report["probes"] for value in probe["nll"].values()]
    assert len({round(value, 6) for value in nll}) == len(nll) == 9
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["L1", "x", "Wg", "softmax", f"{norm['nll']['softmax']:.4f}"] in [
        row[:5] for row in rows
    ]


@pytest.mark.slow
def test_a_text_and_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "PROBES", dict(list(probing.PROBES.items())[:1]))
    (tmp_path / "text.txt").write_text("the state of the union " * 50)
    tasks = {"tasks": ["speeches_cloze"], "fewshot": 0, "limit": 4}
    report = probing.probe_checkpoint(
        kind_run("router")[0], tmp_path, text=str(tmp_path / "text.txt"), **tasks
    )
    assert 50 < report["tokens"] < 400
    found = report["probes"][0]["tasks"]
    assert (
        found["softmax"]["speeches_cloze"]["examples"]
        == found["equal"]["speeches_cloze"]["examples"]
        == 4
    )


@pytest.mark.slow
def test_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "PROBES", dict(list(probing.PROBES.items())[:1]))
    save(random_model("qwen3_moe", vocab_size=512), tmp_path, "fused")
    texts = [path.read_text() for path in sorted(corpus_folder().iterdir())]
    train_tokenizer(texts, 512).save(tmp_path)
    (tmp_path / "text.txt").write_text(texts[0])
    report = probing.probe_checkpoint(tmp_path, tmp_path, text=str(tmp_path / "text.txt"))
    (router,) = report["probes"]
    assert router["agreement"] == 1.0 and 6 < router["nll"]["softmax"] != router["nll"]["equal"]


def test_a_choice_by_a_selection_bias_is_refused():
    model = make_model(make_config(experts__kind="router"))
    probing.check_probes(model)
    with pytest.raises(UserError, match=r"config\.balance\.bias_rate: .*probe a model without one"):
        probing.check_probes(
            dataclasses.replace(
                model, routing_state={"selection_bias": np.zeros((2, 4), np.float32)}
            )
        )


def test_what_has_no_router(tmp_path):
    with pytest.raises(UserError, match=r"experts\.kind='aoe': a probe drops a router"):
        probing.probe_checkpoint(finished_run(), tmp_path)


def test_tasks_without_a_name():
    with pytest.raises(UserError, match="--tasks= names nothing; see --help"):
        call("aoe_jax.probe", "--checkpoint=x", "--tasks=")

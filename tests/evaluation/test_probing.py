"""Experts chosen by norms, against plain loops, and the table of probes of a run."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax import RouterLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation import probing
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.evaluation.probing import (
    NODES,
    ProbeRouter,
    by_chance,
    by_norm,
    by_router,
)
from benchmarks.parity import random_model, save
from tests.arrays import mesh_of
from tests.evaluation.models import make_config, make_model
from tests.evaluation.public_tasks import write_examples
from tests.in_process import call
from tests.runs import corpus_folder, finished_run, kind_run

pytestmark = pytest.mark.usefixtures("ragged")

EXPERTS = ExpertsConfig(kind="router", n_experts=4, top_k=2, d_ffn=12)
X = jax.random.normal(jax.random.key(0), (8, 6, 16))
WEIGHTS = (jnp.arange(48) % 5 > 0).reshape(8, 6).astype(jnp.float32)
PARAMS = jax.jit(RouterLayer(EXPERTS).init)(jax.random.key(1), X)["params"]


def apply(choose, equal_weights=False):
    layer = RouterLayer(EXPERTS, routing=ProbeRouter(choose, equal_weights))
    y, stats = jax.jit(partial(layer.apply, {"params": PARAMS}))(X, WEIGHTS)
    return np.asarray(y).reshape(-1, 16), float(stats.records["agreement"])


def silu(a):
    return a / (1 + np.exp(-a))


def at_nodes(x, expert):
    """The activations of an expert for a token, node by node."""
    w_gate, w_up, w_down = (
        np.asarray(PARAMS[name][expert], np.float64) for name in ("w_gate", "w_up", "w_down")
    )
    gate, up = x @ w_gate, x @ w_up
    hidden = silu(gate) * up
    return dict(zip(NODES, (gate, up, silu(gate), hidden, hidden @ w_down), strict=True))


def by_loops(node, norm, equal_weights=False):
    outputs, shares = [], []
    for x in np.asarray(X, np.float64).reshape(-1, 16):
        experts = [at_nodes(x, expert) for expert in range(4)]
        order = {"L1": 1, "L2": 2, "Linf": np.inf}[norm]
        scores = np.array([np.linalg.norm(expert[node], order) for expert in experts])
        chosen = np.argsort(-scores)[:2]
        weights = np.exp(scores[chosen] - scores[chosen].max())
        weights = np.full(2, 0.5) if equal_weights else weights / weights.sum()
        outputs.append(weights @ [experts[i]["output"] for i in chosen])
        routed = np.argsort(-(x @ np.asarray(PARAMS["w_router"], np.float64)))[:2]
        shares.append(len({*chosen} & {*routed}) / 2)
    return np.stack(outputs), np.average(shares, weights=np.asarray(WEIGHTS).reshape(-1))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("node", "norm"), [*((node, "L2") for node in NODES), ("x Wg", "L1"), ("x Wg", "Linf")]
)
def test_choice_by_norm(node, norm):
    y, agreement = apply(by_norm(node, norm))
    want, want_agreement = by_loops(node, norm)
    np.testing.assert_allclose(y, want, atol=1e-4)
    np.testing.assert_allclose(agreement, want_agreement, rtol=1e-5)
    assert 0.3 < agreement < 0.8


def test_other_choices():
    """Equal weights, the router itself, and a random choice."""
    want = by_loops("x Wg", "L2", equal_weights=True)[0]
    np.testing.assert_allclose(apply(by_norm("x Wg", "L2"), True)[0], want, atol=1e-4)
    y, agreement = apply(by_router)
    of_layer = jax.jit(RouterLayer(EXPERTS).apply)({"params": PARAMS}, X, WEIGHTS)[0]
    np.testing.assert_array_equal(y, of_layer.reshape(-1, 16))
    assert agreement == 1
    y, agreement = apply(by_chance, True)
    assert 0.3 < agreement < 0.7  # half of four on average
    assert float(np.abs(y - apply(by_router, True)[0]).max()) > 0.1


@pytest.mark.parametrize(
    ("shape", "choose"),
    [((2, 2, 2, 1), by_norm("SiLU(x Wg) * x Wp", "L2")), ((1, 2, 4, 1), by_chance)],
    ids=["norm", "chance"],
)
def test_meshes_choose_alike(shape, choose):
    want = apply(choose)
    with jax.set_mesh(mesh_of(*shape)):
        found = apply(choose)
    np.testing.assert_allclose(found[0], want[0], atol=1e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-6)


@pytest.fixture
def few_probes(monkeypatch, request):
    """The first probes: router, chance, and norms. Each is a program of its own to compile."""
    monkeypatch.setattr(probing, "PROBES", dict([*probing.PROBES.items()][: request.param]))


@pytest.mark.slow
@pytest.mark.parametrize("few_probes", [3], indirect=True)
@pytest.mark.usefixtures("one_device")
def test_the_table_of_a_run(tmp_path, few_probes, capsys):
    """The router alone scores as in training; a random choice has equal weights only."""
    workdir = kind_run("router")[0]
    flags = [f"--output={tmp_path}", "--tokens=1000000000"]
    call("aoe_jax.probe", f"--checkpoint={workdir}", *flags)
    report = json.loads((tmp_path / "probe.json").read_text())
    whole = evaluate_workdir(workdir, "validation")
    assert (report["tokens"], report["step"]) == (whole["tokens"], whole["step"])
    router, chance, norm = report["probes"]
    assert router["nll"]["softmax"] == pytest.approx(whole["nll"], rel=1e-5)
    assert (router["agreement"], router["time"]) == (1.0, 1.0)
    assert chance["nll"].keys() == {"equal"}
    assert (norm["node"], norm["norm"]) == ("x Wg", "L1")
    assert all(0.3 < probe["agreement"] < 0.9 and probe["time"] > 0 for probe in (chance, norm))
    nll = [value for probe in report["probes"] for value in probe["nll"].values()]
    assert len({round(value, 6) for value in nll}) == len(nll) == 5
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["L1", "x", "Wg", "softmax", f"{norm['nll']['softmax']:.4f}"] in rows


@pytest.mark.slow
@pytest.mark.parametrize("few_probes", [1], indirect=True)
def test_a_model_of_the_hub_on_a_text_and_a_task(tmp_path, few_probes):
    save(random_model("qwen3_moe", vocab_size=512), tmp_path, "fused")
    texts = [path.read_text() for path in sorted(corpus_folder().iterdir())]
    train_tokenizer(texts, 512).save(tmp_path)
    (tmp_path / "text.txt").write_text(texts[0])
    data = write_examples(tmp_path / "data")
    settings = {"tasks": ["sst2"], "fewshot": 0, "limit": 4, "data": data}
    text = str(tmp_path / "text.txt")
    report = probing.probe_checkpoint(tmp_path, tmp_path, text=text, **settings)
    (router,) = report["probes"]
    assert router["agreement"] == 1.0 and 6 < router["nll"]["softmax"] != router["nll"]["equal"]
    for weights in probing.WEIGHTS:
        assert router["tasks"][weights]["sst2"]["examples"] == 4


def test_mistakes(tmp_path):
    model = make_model(make_config(experts__kind="router"))
    probing.check_probes(model)
    biased = dataclasses.replace(model, routing_state={"selection_bias": np.zeros((2, 4))})
    with pytest.raises(UserError, match=r"config\.balance\.bias_rate: .*probe a model without one"):
        probing.check_probes(biased)
    with pytest.raises(UserError, match=r"experts\.kind='aoe': a probe drops a router"):
        probing.probe_checkpoint(finished_run(), tmp_path)
    factorised = dataclasses.replace(model.config.experts, factorised_gate=True)
    with pytest.raises(UserError, match=r"experts\.factorised_gate=True: a probe drops a router"):
        probing.check_config(dataclasses.replace(model.config, experts=factorised))
    with pytest.raises(UserError, match="/none/config.json cannot be read"):
        probing.probe_checkpoint(tmp_path / "none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for flag in ("tasks", "tasks-data", "output"):
        with pytest.raises(UserError, match=f"--{flag}= names nothing; see --help"):
            call("aoe_jax.probe", "--checkpoint=x", f"--{flag}=")

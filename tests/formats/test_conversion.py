"""The gates that convert.py factorises, beside numpy's decomposition."""

import json

import jax
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.formats.conversion import convert
from aoe_jax.formats.reading import load_params, read_config
from aoe_jax.sharding import fill_mesh, make_mesh
from tests.formats.hub import hub_models, logits_here
from tests.formats.test_writing import written
from tests.runs import tiny_config


def parameters(directory):
    config = fill_mesh(read_config(directory), 1)
    return jax.device_get(load_params(directory, config, make_mesh(config, jax.devices()[:1]))[0])


@pytest.mark.parametrize("d_low", [24, 8])
def test_gates_are_the_best_of_their_rank(tmp_path, d_low):
    source = hub_models()["mixtral"][0]["per_expert"]
    report = convert(source, tmp_path / "aoe", d_low)
    assert json.loads((tmp_path / "aoe" / "convert.json").read_text()) == report
    before, after = parameters(source), parameters(tmp_path / "aoe")
    old, new = before["layers"].pop("experts"), after["layers"].pop("experts")
    assert old.keys() - new.keys() == {"w_router", "w_g"} and new.keys() - old.keys() == {"w_down", "w_up"}
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for name in ("w_p", "w_o"):
        np.testing.assert_array_equal(old[name], new[name])
    x = np.random.default_rng(0).normal(size=(5, 32))
    for layer, expert in np.ndindex(2, 4):
        w = old["w_g"][layer, expert].astype(np.float64)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        best = u[:, :d_low] * s[:d_low] @ v[:d_low]
        w_down, w_up = (new[name][layer, expert] for name in ("w_down", "w_up"))
        np.testing.assert_allclose(w_down @ w_up, best, atol=2e-5)
        np.testing.assert_allclose(w_up @ w_up.T, np.eye(d_low), atol=2e-5)
        norms = np.linalg.norm(x @ w_down, axis=1), np.linalg.norm(x @ best, axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-4)
        kept = report["energy_kept"]["layers"][layer]["experts"][expert]
        np.testing.assert_allclose(kept, np.sum(s[:d_low] ** 2) / np.sum(s**2), rtol=1e-5)
    layers = report["energy_kept"]["layers"]
    assert all(layer["min"] == min(layer["experts"]) for layer in layers)
    np.testing.assert_allclose(report["energy_kept"]["mean"], np.mean([layer["experts"] for layer in layers]))


@pytest.mark.parametrize("architecture, gate", [("mixtral", "chosen"), ("olmoe", "all"), ("phimoe", "chosen")])
def test_the_result_is_a_model(tmp_path, architecture, gate):
    source = hub_models()[architecture][0]["fused"]
    convert(source, tmp_path / "aoe", 16)
    config, old = read_config(tmp_path / "aoe"), read_config(source)
    assert (config.experts.kind, config.experts.d_low, config.experts.width(32)) == ("aoe", 16, 24)
    assert (config.experts.gate, config.experts.top_k, config.model) == (gate, 2, old.model)
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()
    assert json.loads((tmp_path / "aoe" / "config.json").read_text())["eos_token_id"] == 1


def test_bfloat16_stays(tmp_path):
    config = tiny_config(experts__kind="router")
    directory = written(tmp_path, config, "bfloat16")[0]
    convert(directory, tmp_path / "aoe", 8)
    dtypes = {a.dtype.name for a in jax.tree.leaves(parameters(tmp_path / "aoe"))}
    assert dtypes == {"bfloat16"} and read_config(tmp_path / "aoe").model.dtype == "bfloat16"


REFUSED = {
    "aoe": ({}, 8, "has experts.kind='aoe'; only a router MoE"),
    "dense": ({"experts__kind": "dense"}, 8, "has experts.kind='dense'; only a router MoE"),
    "factorised": ({"experts__kind": "router", "experts__factorised_gate": True}, 8, "a router with factorised gates"),
    "rank of the model": ({"experts__kind": "router"}, 32, "--d_low=32: must be below d_model=32"),
    "rank of the expert": (
        {"experts__kind": "router", "experts__d_ffn": 16},
        17,
        "--d_low=17: .* at most the width 16",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_by_name(tmp_path, mistake):
    changes, d_low, words = REFUSED[mistake]
    directory = written(tmp_path, tiny_config(**changes))[0]
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path / "aoe", d_low)
    assert not (tmp_path / "aoe").exists()

"""The gates that convert.py factorises, beside numpy's decomposition."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aoe_jax.errors import UserError
from aoe_jax.formats.conversion import convert
from aoe_jax.formats.reading import load_params, read_config
from aoe_jax.moe.reference import aoe_layer, router_layer
from aoe_jax.moe.routing import TopK
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
    assert old.keys() - new.keys() == {"w_router", "w_gate"} and new.keys() - old.keys() == {
        "w_gate_down",
        "w_gate_up",
    }
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for name in ("w_up", "w_down"):
        np.testing.assert_array_equal(old[name], new[name])
    x = np.random.default_rng(0).normal(size=(5, 32))
    for layer, expert in np.ndindex(2, 4):
        w = old["w_gate"][layer, expert].astype(np.float64)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        best = u[:, :d_low] * s[:d_low] @ v[:d_low]
        w_gate_down, w_gate_up = (new[name][layer, expert] for name in ("w_gate_down", "w_gate_up"))
        np.testing.assert_allclose(w_gate_down @ w_gate_up, best, atol=5e-5)
        np.testing.assert_allclose(w_gate_up @ w_gate_up.T, np.eye(d_low), atol=5e-5)
        norms = np.linalg.norm(x @ w_gate_down, axis=1), np.linalg.norm(x @ best, axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-4)
        kept = report["energy_kept"]["layers"][layer]["experts"][expert]
        np.testing.assert_allclose(kept, np.sum(s[:d_low] ** 2) / np.sum(s**2), rtol=1e-5)
    layers = report["energy_kept"]["layers"]
    assert all(layer["min"] == min(layer["experts"]) for layer in layers)
    np.testing.assert_allclose(
        report["energy_kept"]["mean"], np.mean([layer["experts"] for layer in layers])
    )


@pytest.mark.parametrize(
    "architecture, norm_topk_prob", [("mixtral", True), ("olmoe", False), ("phimoe", True)]
)
def test_the_result_is_a_model(tmp_path, architecture, norm_topk_prob):
    source = hub_models()[architecture][0]["fused"]
    convert(source, tmp_path / "aoe", 16)
    config, old = read_config(tmp_path / "aoe"), read_config(source)
    assert (config.experts.kind, config.experts.d_low, config.experts.width(32)) == ("aoe", 16, 24)
    assert config.routing == TopK(norm_topk_prob)
    assert (config.experts.top_k, config.model) == (2, old.model)
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()
    assert json.loads((tmp_path / "aoe" / "config.json").read_text())["eos_token_id"] == 1


def test_parameters_keep_their_dtypes(tmp_path, caplog):
    """Here norms and the output table are finer than the rest; a selection bias goes with the
    router.
    """
    directory = written(
        tmp_path,
        tiny_config(experts__kind="router", model__tie_embeddings=False, balance__bias_rate=0.01),
        "bfloat16",
    )[0]
    file = directory / "model.safetensors"
    tensors = load_file(file)
    fine = {name for name in tensors if "norm" in name or "lm_head" in name}
    save_file(
        {name: a.astype("float32" if name in fine else a.dtype) for name, a in tensors.items()},
        file,
    )
    convert(directory, tmp_path / "aoe", 8)
    assert "selection bias of loss-free balancing goes with the router" in caplog.text
    config, written_there = (
        read_config(tmp_path / "aoe"),
        load_file(tmp_path / "aoe" / "model.safetensors"),
    )
    assert config.model.dtype == "bfloat16"
    assert {name: a.dtype.name for name, a in written_there.items()} == {
        name: "float32" if name in fine else "bfloat16" for name in written_there
    }
    assert sum(name in fine for name in written_there) == len(fine) and not any(
        "bias" in n for n in written_there
    )
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()


def test_gates_of_full_rank_compute_the_same(tmp_path):
    """With all experts chosen, an AoE whose gates lose nothing computes what the MoE did."""
    changes = {"experts__n_experts": 2, "experts__top_k": 2, "experts__d_ffn": 24}
    directory, params, *_ = written(tmp_path, tiny_config(experts__kind="router", **changes))
    convert(directory, tmp_path / "aoe", 24)
    factors = parameters(tmp_path / "aoe")["layers"]["experts"]
    np.testing.assert_allclose(
        factors["w_gate_down"] @ factors["w_gate_up"],
        params["layers"]["experts"]["w_gate"],
        atol=1e-5,
    )
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    for layer in range(2):
        experts = {
            name: np.asarray(a[layer], np.float64)
            for name, a in params["layers"]["experts"].items()
        }
        low = {name: np.asarray(a[layer], np.float64) for name, a in factors.items()}
        norms = np.linalg.norm(np.einsum("td,ndr->tnr", x, low["w_gate_down"]), axis=-1)
        # The reference of an MoE whose router gives these norms: the norms of x w_gate itself.
        whole = np.linalg.norm(np.einsum("td,ndf->tnf", x, experts["w_gate"]), axis=-1)
        np.testing.assert_allclose(norms, whole, rtol=1e-5)
        outputs = [
            router_layer(
                x,
                np.zeros((32, 1)),
                *(experts[name][i : i + 1] for name in ("w_gate", "w_up", "w_down")),
                top_k=1,
            )
            for i in range(2)
        ]
        weights = np.exp(whole) / np.exp(whole).sum(axis=1, keepdims=True)
        found = aoe_layer(
            x, *(low[name] for name in ("w_gate_down", "w_gate_up", "w_up", "w_down")), top_k=2
        )
        np.testing.assert_allclose(
            found, sum(weights[:, i : i + 1] * outputs[i] for i in range(2)), rtol=1e-4, atol=1e-5
        )


def test_the_run_of_a_router_may_have_trained_it_alone(tmp_path):
    run = tiny_config(experts__kind="router", train__router_steps=3)
    directory = written(tmp_path, run)[0]
    (directory / "aoe_jax.json").write_text(json.dumps({"step": 9, "config": run.to_dict()}))
    convert(directory, tmp_path / "aoe", 8)
    assert read_config(tmp_path / "aoe").train.router_steps == 0


REFUSED = {
    "aoe": ({}, 8, "has experts.kind='aoe'; only a router MoE"),
    "dense": ({"experts__kind": "dense"}, 8, "has experts.kind='dense'; only a router MoE"),
    "capacity": (
        {"experts__kind": "capacity"},
        8,
        "has experts.kind='capacity'; only a router MoE",
    ),
    "factorised": (
        {"experts__kind": "router", "experts__factorised_gate": True},
        8,
        "a router with factorised gates",
    ),
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

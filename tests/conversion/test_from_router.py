"""Router MoEs made into AoEs: factorised gates, and the neurons of whole gates that score."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aoe_jax.conversion.from_router import _converted, convert, convert_summary
from aoe_jax.conversion.scoring_neurons import agreement, telling_neurons
from aoe_jax.errors import UserError
from aoe_jax.formats.loading import read_config
from aoe_jax.moe.routing import TopK
from aoe_jax.moe.swiglu import single_expert
from benchmarks.parity import logits_here
from tests.conversion.models import batches, observed, parameters, source
from tests.evaluation.models import make_config, make_model
from tests.formats.test_loading import edit
from tests.runs import corpus_folder, scratch, shared, tiny_config

FINDABLE = np.array([5, 11, 0, 23])  # for each expert, the neuron whose multiple is its router


def test_gates_are_the_best_of_their_rank(tmp_path):
    directory = source(tmp_path, experts__kind="router")
    report = convert(directory, tmp_path / "aoe", 8)
    assert json.loads((tmp_path / "aoe" / "convert.json").read_text()) == report
    before, after = parameters(directory), parameters(tmp_path / "aoe")
    old, new = before["layers"].pop("experts"), after["layers"].pop("experts")
    assert old.keys() - new.keys() == {"w_router", "w_gate"}
    assert new.keys() - old.keys() == {"w_gate_down", "w_gate_up"}
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for name in ("w_up", "w_down"):
        np.testing.assert_array_equal(old[name], new[name])
    x, energy = np.random.default_rng(0).normal(size=(5, 32)), report["energy_kept"]
    for layer, expert in np.ndindex(2, 4):
        w = old["w_gate"][layer, expert].astype(np.float64)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        best = u[:, :8] * s[:8] @ v[:8]
        w_gate_down, w_gate_up = (new[name][layer, expert] for name in ("w_gate_down", "w_gate_up"))
        np.testing.assert_allclose(w_gate_down @ w_gate_up, best, atol=5e-5)
        np.testing.assert_allclose(w_gate_up @ w_gate_up.T, np.eye(8), atol=5e-5)
        norms = np.linalg.norm(x @ w_gate_down, axis=1), np.linalg.norm(x @ best, axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-4)
        kept = energy["layers"][layer][expert]
        np.testing.assert_allclose(kept, np.sum(s[:8] ** 2) / np.sum(s**2), rtol=1e-5)
    np.testing.assert_allclose(energy["mean"], np.mean(energy["layers"]))


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_the_result_is_a_model(tmp_path, architecture):
    """Parameters keep their dtypes: here norms and the output table are finer than the rest."""
    changes = {"experts__kind": "router", "experts__d_ffn": 24, "model__tie_embeddings": False}
    if architecture == "olmoe":
        changes |= {"model__qk_norm": "all", "routing__norm_topk_prob": False}
    old = tiny_config(train__router_steps=3, **changes)
    directory = source(tmp_path, "bfloat16", train__router_steps=3, **changes)
    assert json.loads((directory / "config.json").read_text())["model_type"] == architecture
    tensors = load_file(directory / "model.safetensors")
    fine = {name for name in tensors if "norm" in name or "lm_head" in name}
    edit(directory, **{name: tensors[name].astype("float32") for name in fine})
    (directory / "aoe_jax.json").write_text(json.dumps({"step": 9, "config": old.to_dict()}))
    convert(directory, tmp_path / "aoe", 16)
    config = read_config(tmp_path / "aoe")
    assert (config.experts.kind, config.experts.d_low, config.experts.width(32)) == ("aoe", 16, 24)
    assert config.routing == TopK(architecture == "mixtral")
    assert (config.experts.top_k, config.model) == (2, old.model)
    assert config.train.router_steps == 0
    found = load_file(tmp_path / "aoe" / "model.safetensors")
    assert fine <= found.keys()
    for name, a in found.items():
        assert a.dtype.name == ("float32" if name in fine else "bfloat16")
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()


def test_a_selection_bias_is_dropped_with_the_router(tmp_path, caplog):
    biased = source(tmp_path, experts__kind="router", balance__bias_rate=0.01)
    convert(biased, tmp_path / "aoe", 8)
    assert "selection bias of loss-free balancing is dropped with the router" in caplog.text
    assert not any("bias" in name for name in load_file(tmp_path / "aoe" / "model.safetensors"))


@shared
def routed_by_neurons():
    """The directory of a router MoE whose logits are three times a neuron of each expert."""
    directory = source(scratch("routed"), experts__kind="router")
    for layer, w_gate in enumerate(parameters(directory)["layers"]["experts"]["w_gate"]):
        router = np.stack([w_gate[i, :, neuron] for i, neuron in enumerate(FINDABLE)])
        edit(directory, **{f"model.layers.{layer}.block_sparse_moe.gate.weight": 3 * router})
    return directory


def measured(output, **form):
    """The report of a conversion of `routed_by_neurons`."""
    form |= {"data": f"text@{corpus_folder()}", "n_tokens": 1000}
    return convert(routed_by_neurons(), output, **form)


@pytest.mark.slow
@pytest.mark.usefixtures("ragged")
def test_the_neuron_of_the_router_is_found(tmp_path):
    """The scores choose the router's experts; the largest activation needs one neuron for this."""
    report = measured(tmp_path / "aoe", score_neurons=1, score="max")
    assert json.loads((tmp_path / "aoe" / "convert.json").read_text()) == report
    assert report["agreement"] == {"mean": 1.0, "layers": [1.0, 1.0], "chance": 0.5}
    before, after = parameters(routed_by_neurons()), parameters(tmp_path / "aoe")
    for layer, expert in np.ndindex(2, 4):
        found, w_gate = (p["layers"]["experts"]["w_gate"][layer, expert] for p in (after, before))
        np.testing.assert_array_equal(found[:, 0], w_gate[:, FINDABLE[expert]])
    assert (report["score_neurons"], report["score"]) == (1, "max")


def test_weights_stay_those_of_the_router():
    """ERC's weights are those of top-k, also over all scores."""
    changes = {"experts__kind": "router", "routing__name": "erc", "routing__norm_topk_prob": False}
    assert _converted(tiny_config(**changes), 8, None, None).routing == TopK(False)


@pytest.mark.slow
@pytest.mark.usefixtures("ragged")
def test_whole_gates_lose_nothing(tmp_path):
    """Neurons change places; the functions of experts and all other parameters stay. Factorised
    gates are measured on the same text, if it is named.
    """
    whole = measured(tmp_path / "whole", score_neurons=8)
    config = read_config(tmp_path / "whole")
    e = config.experts
    assert (e.kind, e.score_neurons, e.score, e.width(32)) == ("aoe", 8, "norm", 32)
    assert config.routing == TopK() and np.isfinite(logits_here(tmp_path / "whole")).all()
    before, after = parameters(routed_by_neurons()), parameters(tmp_path / "whole")
    old, new = before["layers"].pop("experts"), after["layers"].pop("experts")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert old.keys() - new.keys() == {"w_router"} and new.keys() <= old.keys()
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 32)).astype(np.float32)
    outputs = [np.asarray(single_expert(x, w)) for w in (old, new)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(*(np.sort(w["w_gate"], axis=-1) for w in (old, new)))
    assert (old["w_gate"] != new["w_gate"]).any(axis=(2, 3)).all()

    low = measured(tmp_path / "low", d_low=8)
    assert low.keys() == {"d_low", "d_wide", "energy_kept", "agreement", "nll"}
    assert low["nll"]["before"] == whole["nll"]["before"] != low["nll"]["after"]
    assert low["agreement"]["mean"] < whole["agreement"]["mean"]
    summary = convert_summary(low)
    assert f"agreement with the router: {low['agreement']['mean']:.3f} (by chance" in summary
    assert summary.endswith(f", after {low['nll']['after']:.4f}")


@pytest.mark.usefixtures("ragged")
def test_chosen_neurons_agree_better():
    """They agree with a router better than the first neurons and than random ones do."""
    rng = np.random.default_rng(0)
    model = make_model(make_config(experts__kind="router", experts__n_experts=8))
    w_gate = np.asarray(model.params["layers"]["experts"]["w_gate"])
    calibration, held_out = observed(model, batches(4)), observed(model, batches(4, seed=1))

    def share(neurons, score):
        own = np.take_along_axis(w_gate, np.asarray(neurons)[:, :, None, :], axis=3)
        shares, by_chance = agreement(held_out, own, score)
        assert by_chance == 0.25
        code = np.einsum("ltd,lndr->ltnr", held_out[2], own)
        scores = np.linalg.norm(code, axis=-1) if score == "norm" else code.max(axis=-1)
        best = (-scores).argsort(axis=-1).argsort(axis=-1) < 2
        of_routed = (best & held_out[1]).sum(axis=(1, 2)) / held_out[1].sum(axis=(1, 2))
        np.testing.assert_allclose(shares, of_routed, rtol=1e-3)
        return shares

    first = np.broadcast_to(np.arange(4), (2, 8, 4))
    random = [rng.permuted(np.tile(np.arange(32), (2, 8, 1)), axis=2)[..., :4] for _ in range(3)]
    for score in ("norm", "max"):
        logits, chosen, x = calibration
        of_layers = zip(x, logits, chosen, w_gate, strict=True)
        found = [np.asarray(telling_neurons(*layer, 4, score)) for layer in of_layers]
        assert all(len({*own}) == 4 for layer in found for own in layer)
        best = share(found, score)
        assert all((best > share(other, score) + 0.05).all() for other in (first, *random))


ROUTER = {"experts__kind": "router"}
REFUSED = [
    ({}, {"d_low": 8}, "experts.kind='aoe': only a router MoE"),
    (ROUTER | {"experts__factorised_gate": True}, {"d_low": 8}, "_gate=True: only a router"),
    (ROUTER, {"d_low": 32}, "--d_low=32: must be below d_model=32"),
    (ROUTER | {"experts__d_ffn": 16}, {"d_low": 17}, "--d_low=17: .* at most the width 16"),
    (ROUTER, {"score_neurons": 33}, "--score_neurons=33: must be at most the width 32"),
]


@pytest.mark.parametrize(("changes", "form", "words"), REFUSED)
def test_refused_by_name(tmp_path, changes, form, words):
    directory = source(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path / "aoe", **form)
    assert not (tmp_path / "aoe").exists()


def test_a_mesh_that_does_not_fit_the_result(tmp_path):
    directory, corpus = source(tmp_path, **ROUTER), f"text@{corpus_folder()}"
    with pytest.raises(UserError, match=r"mesh\.fsdp=4: must divide experts\.d_low=30"):
        convert(directory, tmp_path / "aoe", d_low=30, mesh="fsdp=4", data=corpus)
    assert not (tmp_path / "aoe").exists()

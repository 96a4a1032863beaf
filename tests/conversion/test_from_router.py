"""The gates that convert.py factorises, beside numpy's decomposition, and the neurons of whole
gates that it lets score.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aoe_jax.conversion.from_router import convert, convert_summary
from aoe_jax.conversion.scoring_neurons import agreement, observed_choices, telling_neurons
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import write_arrays
from aoe_jax.moe.reference import aoe_layer, router_layer
from aoe_jax.moe.routing import TopK
from aoe_jax.moe.swiglu import single_expert
from aoe_jax.sharding import fill_mesh, make_mesh
from benchmarks.parity import logits_here
from tests.conversion.models import batches
from tests.evaluation.models import make_config, make_model
from tests.formats.test_writing import written
from tests.runs import corpus_folder, scratch, shared, tiny_config

FINDABLE = np.array([5, 11, 0, 23])  # by expert, the neuron of which its router is a multiple


def parameters(directory):
    config = fill_mesh(read_config(directory), 1)
    return jax.device_get(load_params(directory, config, make_mesh(config, jax.devices()[:1]))[0])


@pytest.mark.parametrize("d_low", [24, 8])
def test_gates_are_the_best_of_their_rank(tmp_path, d_low):
    source = written(tmp_path, tiny_config(experts__kind="router"))[0]
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


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_the_result_is_a_model(tmp_path, architecture):
    changes = {"mixtral": {}, "olmoe": {"model__qk_norm": "all", "routing__norm_topk_prob": False}}
    config = tiny_config(experts__kind="router", experts__d_ffn=24, **changes[architecture])
    source = written(tmp_path, config)[0]
    assert json.loads((source / "config.json").read_text())["model_type"] == architecture
    convert(source, tmp_path / "aoe", 16)
    config, old = read_config(tmp_path / "aoe"), read_config(source)
    assert (config.experts.kind, config.experts.d_low, config.experts.width(32)) == ("aoe", 16, 24)
    assert config.routing == TopK(architecture == "mixtral")
    assert (config.experts.top_k, config.model) == (2, old.model)
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()


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
    finer = {name: tensors[name].astype("float32") for name in fine}
    save_file(tensors | finer, file)
    convert(directory, tmp_path / "aoe", 8)
    assert "selection bias of loss-free balancing goes with the router" in caplog.text
    found = load_file(tmp_path / "aoe" / "model.safetensors")
    assert read_config(tmp_path / "aoe").model.dtype == "bfloat16"
    assert fine <= found.keys() and not any("bias" in name for name in found)
    for name, a in found.items():
        assert a.dtype.name == ("float32" if name in fine else "bfloat16")
    assert np.isfinite(logits_here(tmp_path / "aoe")).all()


def test_gates_of_full_rank_compute_the_same(tmp_path):
    """With all experts chosen, an AoE whose gates lose nothing computes the sum of the MoE's
    experts, weighted by the softmax of the norms of x w_gate.
    """
    changes = {"experts__n_experts": 2, "experts__top_k": 2, "experts__d_ffn": 24}
    directory, params, *_ = written(tmp_path, tiny_config(experts__kind="router", **changes))
    convert(directory, tmp_path / "aoe", 24)
    factors = parameters(tmp_path / "aoe")["layers"]["experts"]
    whole = jax.device_get(params["layers"]["experts"])
    product = factors["w_gate_down"] @ factors["w_gate_up"]
    np.testing.assert_allclose(product, whole["w_gate"], atol=1e-5)
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    for layer in range(2):
        old, low = (
            {name: np.asarray(a[layer], np.float64) for name, a in experts.items()}
            for experts in (whole, factors)
        )
        norms = np.linalg.norm(np.einsum("td,ndf->tnf", x, old["w_gate"]), axis=-1)
        code = np.einsum("td,ndr->tnr", x, low["w_gate_down"])
        np.testing.assert_allclose(np.linalg.norm(code, axis=-1), norms, rtol=1e-5)
        each = [[old[n][i : i + 1] for n in ("w_gate", "w_up", "w_down")] for i in range(2)]
        outputs = [router_layer(x, np.zeros((32, 1)), *one, top_k=1) for one in each]
        weights = np.exp(norms) / np.exp(norms).sum(axis=1, keepdims=True)
        want = sum(weights[:, i : i + 1] * outputs[i] for i in range(2))
        matrices = [low[name] for name in ("w_gate_down", "w_gate_up", "w_up", "w_down")]
        np.testing.assert_allclose(aoe_layer(x, *matrices, top_k=2), want, rtol=1e-4, atol=1e-5)


def test_the_run_of_a_router_may_have_trained_it_alone(tmp_path):
    run = tiny_config(experts__kind="router", train__router_steps=3)
    directory = written(tmp_path, run)[0]
    (directory / "aoe_jax.json").write_text(json.dumps({"step": 9, "config": run.to_dict()}))
    convert(directory, tmp_path / "aoe", 8)
    assert read_config(tmp_path / "aoe").train.router_steps == 0


@shared
def routed_by_neurons():
    """The directory of a router MoE whose logits are three times a neuron of each expert."""
    folder = scratch("routed")
    directory, params, *_, config = written(folder, tiny_config(experts__kind="router"))
    layers = jax.device_get(params["layers"])
    w_gate = layers["experts"]["w_gate"]
    router = np.stack([w_gate[:, i, :, neuron] for i, neuron in enumerate(FINDABLE)], axis=-1)
    params = params | {"layers": layers | {"experts": layers["experts"] | {"w_router": 3 * router}}}
    texts = [path.read_text() for path in sorted(corpus_folder().iterdir())]
    train_tokenizer(texts, config.model.vocab_size).save(folder)
    values = to_json(config) | write_tokenizer(folder, directory, config.model.max_len)
    write_arrays(directory, values, params, {}, None)
    return directory


def measured(output, **form):
    """The report of a conversion of `routed_by_neurons`."""
    return convert(
        routed_by_neurons(), output, data=f"text@{corpus_folder()}", n_tokens=1000, **form
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ragged")
def test_the_neuron_of_the_router_is_found(tmp_path):
    """Then the scores choose what the router chose, and the largest does so from one neuron."""
    report = measured(tmp_path / "aoe", score_neurons=1, score="max")
    assert json.loads((tmp_path / "aoe" / "convert.json").read_text()) == report
    assert report["agreement"] == {"mean": 1.0, "layers": [1.0, 1.0], "chance": 0.5}
    before, after = parameters(routed_by_neurons()), parameters(tmp_path / "aoe")
    for layer, expert in np.ndindex(2, 4):
        found, w_gate = (p["layers"]["experts"]["w_gate"][layer, expert] for p in (after, before))
        np.testing.assert_array_equal(found[:, 0], w_gate[:, FINDABLE[expert]])
    assert (report["score_neurons"], report["score"]) == (1, "max")


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
    assert summary.endswith(f"before, {low['nll']['after']:.4f} after")


@pytest.mark.usefixtures("ragged")
def test_chosen_neurons_agree_better():
    """They agree with a router better than the first neurons and than random ones do."""
    rng, held_out = np.random.default_rng(0), batches(4, seed=1)
    model = make_model(make_config(experts__kind="router", experts__n_experts=8))
    w_gate = np.asarray(model.params["layers"]["experts"]["w_gate"])
    n_tokens = 4 * 8 * 32
    of_all = observed_choices(model, batches(4) + held_out)
    x, _, chosen = (a[:, n_tokens:] for a in of_all)
    assert chosen.sum() == 2 * 2 * (n_tokens - 4 * 12)  # two of each token, none of padding

    def share(neurons, score):
        own = np.take_along_axis(w_gate, np.asarray(neurons)[:, :, None, :], axis=3)
        code = np.einsum("ltd,lndr->ltnr", x, own)
        scores = np.linalg.norm(code, axis=-1) if score == "norm" else code.max(axis=-1)
        best = (-scores).argsort(axis=-1).argsort(axis=-1) < 2
        return (best * chosen).sum(axis=(1, 2)) / chosen.sum(axis=(1, 2)), own

    first = np.broadcast_to(np.arange(4), (2, 8, 4))
    random = [rng.permuted(np.tile(np.arange(32), (2, 8, 1)), axis=2)[..., :4] for _ in range(3)]
    for score in ("norm", "max"):
        of_layers = zip(*(a[:, :n_tokens] for a in of_all), w_gate, strict=True)
        found = [np.asarray(telling_neurons(*layer, 4, score)) for layer in of_layers]
        assert all(len({*own}) == 4 for layer in found for own in layer)
        best, w_score = share(found, score)
        assert all((best > share(other, score)[0] + 0.05).all() for other in (first, *random))
    shares, by_chance = agreement(model, held_out, w_score, "max")
    np.testing.assert_allclose(shares, best, rtol=1e-3)
    assert by_chance == 0.25


def test_neurons_beyond_the_width_are_refused(tmp_path):
    directory = written(tmp_path, tiny_config(experts__kind="router"))[0]
    with pytest.raises(UserError, match="--score_neurons=33: must be at most the width 32"):
        convert(directory, tmp_path / "aoe", score_neurons=33)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("norm", "--checkpoint: .*norm.* is not finite; it is damaged"),
        ("embed_tokens", "--checkpoint: embed/embedding is not finite"),
        ("w1", "--checkpoint: the gate of expert . in layer 0 is not finite"),
        ("w2", "--checkpoint: layers/experts/w_down of layer 0 is not finite"),
    ],
)
def test_damaged_parameters_are_refused(tmp_path, part, words):
    dtype = "bfloat16" if part == "w2" else "float32"
    directory = written(tmp_path, tiny_config(experts__kind="router"), dtype)[0]
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if part in name)
    damaged = tensors[name].copy()
    damaged.flat[-1] = np.nan
    save_file(tensors | {name: damaged}, file)
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path / "aoe", 8)
    assert not (tmp_path / "aoe").exists()


REFUSED = [
    ({}, 8, "has experts.kind='aoe'; only a router MoE"),
    ({"experts__kind": "dense"}, 8, "has experts.kind='dense'; only a router MoE"),
    ({"experts__kind": "capacity"}, 8, "has experts.kind='capacity'; only a router MoE"),
    (
        {"experts__kind": "router", "experts__factorised_gate": True},
        8,
        "a router with factorised gates",
    ),
    ({"experts__kind": "router"}, 32, "--d_low=32: must be below d_model=32"),
    ({"experts__kind": "router", "experts__d_ffn": 16}, 17, "--d_low=17: .* at most the width 16"),
]


@pytest.mark.parametrize(("changes", "d_low", "words"), REFUSED)
def test_refused_by_name(tmp_path, changes, d_low, words):
    directory = written(tmp_path, tiny_config(**changes))[0]
    with pytest.raises(UserError, match=words):
        convert(directory, tmp_path / "aoe", d_low)
    assert not (tmp_path / "aoe").exists()

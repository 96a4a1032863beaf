"""Written and read again, a model is the same, bit by bit; transformers computes the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.errors import UserError
from aoe_jax.formats import tensor_files
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.formats.writing import new_directory, parameters_of, write_model
from aoe_jax.model.declared import state_shardings
from aoe_jax.sharding import fill_mesh, make_mesh
from aoe_jax.training.step import init_state
from benchmarks.parity import TOKENS as HUB_TOKENS
from benchmarks.parity import logits_here, logits_there
from tests.formats.hub import hub_models
from tests.formats.test_configs import VARIANTS
from tests.runs import tiny_config

EVERYTHING = {  # that a model of the hub may have
    "model__n_heads": 4,
    "model__n_kv_heads": 2,
    "model__qk_norm": "all",
    "model__attention_bias": True,
    "model__tie_embeddings": False,
}
OF_OTHER_TENSORS = (
    *("aoe", "aoe, shared expert", "aoe, dynmoe", "router", "router, factorised", "router, large"),
    *("router, shared expert with a gate", "router, dense layers in front", "router, routing-free"),
    *("router, part of the head", "dense", "uoe"),
)
THOR = {"experts__kind": "thor", "experts__factorised_gate": True, "routing__inference": "token"}
WRITTEN = {name: VARIANTS[name] for name in OF_OTHER_TENSORS} | {
    "aoe, everything": ("aoe", EVERYTHING),
    "aoe, biased": ("aoe", {"balance__bias_rate": 0.01, "model__tie_embeddings": False}),
    "smear": ("aoe", {"experts__kind": "smear", "routing__segment": 8}),
    "thor, as aoe": ("aoe", THOR),
}


def random_model(config):
    """Parameters, all of them random, and selection bias, on the first devices."""
    config = fill_mesh(config, 1 if config.mesh.data == -1 else 8)
    mesh = make_mesh(config, jax.devices()[: 1 if config.mesh == MeshConfig(data=1) else 8])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(config, 0))
    states = shapes, state_shardings(mesh, shapes)
    wanted, shardings = ((s.params, s.routing_state) for s in states)
    draw = np.random.default_rng(1).normal

    def put(a, sharding):
        return jax.device_put(draw(scale=0.3, size=a.shape).astype(np.float32), sharding)

    return jax.tree.map(put, wanted, shardings), mesh, config


def loaded(directory, dtype=None):
    """`(params, routing_state)` of a model on the first device."""
    config = fill_mesh(read_config(directory), 1)
    return load_params(directory, config, make_mesh(config, jax.devices()[:1]), dtype)


def written(tmp_path, config, dtype="float32"):
    (params, bias), mesh, config = random_model(config)
    values = to_json(config, bias)
    directory = tmp_path / "model"
    directory.mkdir()
    write_model(directory, values, *parameters_of(params, bias, dtype))
    return directory, params, bias, mesh, config


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.smoke
@pytest.mark.parametrize("variant", WRITTEN)
def test_there_and_back(tmp_path, variant):
    model_type, changes = WRITTEN[variant]
    directory, params, bias, mesh, _ = written(tmp_path, tiny_config(**changes))
    found = load_params(directory, fill_mesh(read_config(directory), 1), mesh)
    assert_same(found, (params, bias))
    named = ("biased", "-", "dynmoe", "router, dense layers", "part of")
    assert bool(bias) == any(word in variant for word in named)
    assert json.loads((directory / "config.json").read_text())["model_type"] == model_type


@pytest.mark.parametrize("kind", ["aoe", "router"])
def test_over_a_mesh(tmp_path, kind):
    """Written from arrays that are split over devices, read onto one and onto others."""
    changes = {"experts__kind": kind, "train__batch_size": 8, "balance__bias_rate": 0.01}
    changes |= {"experts__round_to": 4} if kind == "aoe" else {}
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    split = dataclasses.replace(tiny_config(**changes), mesh=mesh)
    directory, params, bias, mesh, config = written(tmp_path, split)
    assert_same(load_params(directory, config, mesh), (params, bias))
    whole = jax.device_get((params, bias))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded(directory)), whole)


def test_bfloat16(tmp_path):
    """The selection bias stays float32; odd numbers of bfloat16 beside it do no harm."""
    config = tiny_config(balance__bias_rate=0.01, experts__d_wide=33)
    directory, params, bias, mesh, config = written(tmp_path, config, "bfloat16")
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert_same(load_params(directory, config, mesh), (narrow, bias))
    assert read_config(directory).model.dtype == "bfloat16"


def test_names_of_our_own_format(tmp_path):
    directory, params, bias, *_ = written(tmp_path, tiny_config(**WRITTEN["aoe, biased"][1]))
    tensors = load_file(directory / "model.safetensors")
    layer, experts = "model.layers.1.", params["layers"]["experts"]
    for name in ("w_gate_down", "w_gate_up", "w_up", "w_down"):
        np.testing.assert_array_equal(tensors.pop(f"{layer}mlp.experts.{name}"), experts[name][1])
    of_file = tensors.pop(f"{layer}mlp.selection_bias")
    np.testing.assert_array_equal(of_file, bias["selection_bias"][1])
    q = np.asarray(params["layers"]["attention"]["q"][1]).reshape(32, -1)
    np.testing.assert_array_equal(tensors.pop(f"{layer}self_attn.q_proj.weight"), q.T)
    o = np.asarray(params["layers"]["attention"]["o"][1]).reshape(-1, 32)
    np.testing.assert_array_equal(tensors.pop(f"{layer}self_attn.o_proj.weight"), o.T)
    np.testing.assert_array_equal(tensors.pop("lm_head.weight"), params["output"]["embedding"])
    rest = {f"{layer}self_attn.{name}_proj.weight" for name in "kv"}
    rest |= {f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert {name for name in tensors if layer in name} == rest
    others = {"model.embed_tokens.weight", "model.norm.weight"}
    assert {name for name in tensors if "layers" not in name} == others


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    ["grouped queries", "rotary factors", "dense layers in front", "part of the head"],
)
def test_transformers_computes_the_same(tmp_path, variant):
    top_k = 2 if "dense" in variant else 3
    config = tiny_config(**VARIANTS[f"router, {variant}"][1], experts__top_k=top_k)
    directory, *_ = written(tmp_path, config)
    tokens = np.random.default_rng(1).integers(0, 512, (4, 48))
    expected = logits_here(directory, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_there(directory, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_llama_with_the_factors_of_llama_3(tmp_path):
    folders, logits = hub_models()["llama"]
    values = to_json(read_config(folders["fused"]))
    assert values["model_type"] == "llama"
    write_model(tmp_path, values, *parameters_of(loaded(folders["fused"])[0]))
    for found in (logits_here(tmp_path), logits_there(tmp_path, HUB_TOKENS)):
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


def test_one_parameter_of_one_layer_at_a_time(tmp_path, monkeypatch):
    (params, _), _, config = random_model(tiny_config(experts__kind="router"))
    arrays = {path: np.asarray(a) for path, a in flatten_dict(params, sep="/").items()}
    asked = []

    def parameter(path, layer):
        asked.append((path, layer))
        return arrays[path] if layer is None else arrays[path][layer]

    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    write_model(tmp_path, to_json(config), arrays, parameter)
    layered = [path for path in arrays if path.startswith("layers/")]
    wanted = [(path, layer) for layer in range(2) for path in layered]
    assert [entry for entry in asked if entry[1] is not None] == wanted
    files = list(tmp_path.glob("*.safetensors"))
    small = [file for file in files if file.stat().st_size < 24_000]
    assert len(files) > 5 and all(len(load_file(file)) == 1 for file in {*files} - {*small})
    found = jax.device_get(loaded(tmp_path)[0])
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))


def test_a_directory_comes_whole_or_not_at_all(tmp_path):
    output = tmp_path / "a" / "model"
    with pytest.raises(RuntimeError), new_directory(output) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(output.parent.iterdir()) == []
    with new_directory(output) as partial:
        (partial / "whole").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.parent.rglob("*")] == ["model", "whole"]


def test_directories_that_are_not_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused = dict.fromkeys((tmp_path, tmp_path / "link"), "exists already; name a new")
    for output, words in (refused | {tmp_path / "file" / "x": "cannot be written"}).items():
        with pytest.raises(UserError, match=f"--output={output} {words}"), new_directory(output):
            pass

"""Models of the hub are read like transformers reads them; errors name what is wrong."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aoe_jax.config.run import Config
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.sharding import fill_mesh, make_mesh
from benchmarks.parity import LAYOUTS, logits_here, logits_there, random_model, save
from configs import finetune
from tests.formats.hub import ARCHITECTURES, hub_models
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("ragged")

SHARDED = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture, layout):
    folders, logits = hub_models()[architecture]
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits_here(folders[layout]), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        ("mixtral", "per expert"),
        ("mixtral", "fused"),
        ("qwen3_moe", "fused"),
        ("dots1", "per expert"),
    ],
)
def test_straight_into_a_mesh(architecture, layout):
    folders, logits = hub_models()[architecture]
    found = logits_here(folders[layout], data=1, fsdp=2, expert=2, tensor=2)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


def copy(tmp_path, architecture="mixtral", layout="per expert"):
    return shutil.copytree(hub_models()[architecture][0][layout], tmp_path / "model")


def load(directory, dtype=None):
    config = fill_mesh(read_config(directory), 1)
    mesh = make_mesh(config, jax.devices()[:1])
    return load_params(directory, config, mesh, dtype)[0]


def change_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({name: value for name, value in values.items() if value != "removed"})
    )


def test_rope_fields_of_before_transformers_5(tmp_path):
    folders, logits = hub_models()["llama"]
    directory = copy(tmp_path, "llama")
    scaling = json.loads((directory / "config.json").read_text())["rope_parameters"]
    scaling["type"] = scaling.pop("rope_type")
    theta = scaling.pop("rope_theta")
    change_config(directory, rope_parameters="removed", rope_theta=theta, rope_scaling=scaling)
    assert read_config(directory) == read_config(folders["per expert"])
    np.testing.assert_allclose(logits_here(directory), logits, rtol=0, atol=1e-4)


def test_an_output_table_beside_a_tied_one_is_ignored(tmp_path):
    """Qwen3-0.6B has one."""
    directory = copy(tmp_path, "qwen3", "fused")
    table = np.zeros((96, 32), np.float32)
    edit(directory, **{"lm_head.weight": table})
    logits = hub_models()["qwen3"][1]
    np.testing.assert_allclose(logits_here(directory), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["dots1", "glm4_moe"])
def test_bfloat16_of_deepseeks_router(tmp_path, architecture):
    import torch

    save(random_model(architecture).to(torch.bfloat16), tmp_path, "per expert")
    there = logits_there(tmp_path)
    np.testing.assert_allclose(logits_here(tmp_path), there, rtol=0, atol=1e-4)
    assert read_config(tmp_path).model.dtype == "bfloat16"


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path, caplog):
    """GLM-4.5 has one, behind the last layer."""
    directory = copy(tmp_path, "glm4_moe", "fused")
    edit(directory, **{"model.layers.3.eh_proj.weight": np.ones((32, 64), np.float32)})
    with caplog.at_level("INFO"):
        logits = logits_here(directory)
    np.testing.assert_allclose(logits, hub_models()["glm4_moe"][1], rtol=0, atol=1e-4)
    assert "left out: layer 3, of multi-token prediction" in caplog.text
    change_config(directory, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="model.layers.3.eh_proj.weight is unknown"):
        load(directory)


def test_code_in_the_directory_is_not_run(tmp_path):
    directory, marker = tmp_path / "model", tmp_path / "run"
    save(random_model("mixtral", vocab_size=300), directory, "fused")
    for name in ("modeling_custom", "configuration_custom", "tokenization_custom", "__init__"):
        (directory / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    auto_map = {
        "AutoConfig": "configuration_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomModel",
        "AutoTokenizer": ["tokenization_custom.CustomTokenizer", None],
    }
    change_config(directory, auto_map=auto_map)
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    train_tokenizer(["the state of the union"] * 9, 300).save(directory)
    assert load_model(directory).config.experts.kind == "router"
    finetune.get_config(str(directory))
    assert not marker.exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_goes_on_with_the_weights_of_the_model_or_of_the_chosen(architecture):
    directory = hub_models()[architecture][0]["per expert"]
    config = Config.from_config_dict(finetune.get_config(str(directory)))
    read = read_config(directory)
    assert config.model == read.model
    assert config.experts == read.experts
    assert config.routing == read.routing


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_dtype_of_the_file_stays(tmp_path, dtype):
    directory = copy(tmp_path, layout="fused")
    tensors = {
        name: a.astype(dtype) for name, a in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors")
    assert read_config(directory).model.dtype == (
        "bfloat16" if dtype == ml_dtypes.bfloat16 else "float32"
    )
    params = load(directory)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    w_gate = np.asarray(params["layers"]["experts"]["w_gate"])[1, 3]
    np.testing.assert_array_equal(
        w_gate.T, tensors["model.layers.1.mlp.experts.gate_up_proj"][3, :24]
    )
    cast = load(directory, jnp.float32)["layers"]["experts"]["w_gate"]
    assert cast.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(cast)[1, 3], w_gate.astype(np.float32))


def edit(directory, file="model.safetensors", **changes):
    """Changes tensors, `None` removes one."""
    tensors = load_file(directory / file) | changes
    save_file({name: a for name, a in tensors.items() if a is not None}, directory / file)


NORM = "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"


def shard_of(directory, name=SHARDED):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def truncate(directory):
    os.truncate(shard_of(directory), shard_of(directory).stat().st_size - 1)


def map_wrongly(directory, name, file):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


def forget(directory):
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][SHARDED]
    (directory / INDEX).write_text(json.dumps(index))


# What is done to a model, of which layout, and words of the message.
DAMAGE = {
    "no safetensors": (
        "fused",
        lambda d: (d / "model.safetensors").unlink(),
        ["neither model.safetensors nor"],
    ),
    "no config.json": (
        "fused",
        lambda d: (d / "config.json").unlink(),
        ["config.json cannot be read (No such file"],
    ),
    "config.json that is no JSON": (
        "fused",
        lambda d: (d / "config.json").write_text("{"),
        ["config.json cannot be read (Expecting"],
    ),
    "config.json that is a list": (
        "fused",
        lambda d: (d / "config.json").write_text("[]"),
        ["holds no JSON object"],
    ),
    "missing tensor": ("fused", lambda d: edit(d, **{NORM: None}), [f"tensor {NORM} is missing"]),
    "missing expert": (
        "fused",
        lambda d: edit(d, **{"model.layers.0.mlp.experts.down_proj": None}),
        # of a layout that is not there at all, the hub's names
        ["model.layers.0.block_sparse_moe.experts.0.w2.weight", "is missing"],
    ),
    "extra tensor": (
        "fused",
        lambda d: edit(d, **{"model.layers.2.input_layernorm.weight": np.ones(32, np.float32)}),
        ["model.safetensors: tensor model.layers.2.input_layernorm.weight is unknown"],
    ),
    "wrong shape": (
        "fused",
        lambda d: edit(d, **{NORM: np.ones(33, np.float32)}),
        [f"model.safetensors: tensor {NORM} is [33], by config.json [32]"],
    ),
    "transposed": (
        "fused",
        lambda d: edit(
            d, **{"model.layers.1.mlp.experts.down_proj": np.ones((4, 24, 32), np.float32)}
        ),
        ["model.layers.1.mlp.experts.down_proj is [4, 24, 32], by config.json [4, 32, 24]"],
    ),
    "several types": (
        "fused",
        lambda d: edit(d, **{NORM: np.ones(32, np.float16)}),
        [f"{NORM} of float16 must be of the same type"],
    ),
    "unknown type": (
        "fused",
        lambda d: edit(d, **{NORM: np.ones(32, np.int8)}),
        [f"model.safetensors: tensor {NORM} is of type I8; only F32, F16, BF16"],
    ),
    "truncated": ("per expert", truncate, ["model-0000", ".safetensors cannot be read", "damaged"]),
    "no safetensors file": (
        "fused",
        lambda d: (d / "model.safetensors").write_text("hello"),
        ["cannot be read"],
    ),
    "missing shard": (
        "per expert",
        lambda d: shard_of(d).unlink(),
        ["model-0000", "is missing; model.safetensors.index"],
    ),
    "index that is no JSON": (
        "per expert",
        lambda d: (d / INDEX).write_text("{"),
        [INDEX, "cannot be read (Expecting"],
    ),
    "index without a map": (
        "per expert",
        lambda d: (d / INDEX).write_text("{}"),
        [INDEX, "weight_map is None, not an object"],
    ),
    "index that leads elsewhere": (
        "per expert",
        lambda d: map_wrongly(d, SHARDED, "../x.safetensors"),
        [f"weight_map['{SHARDED}'] is '../x.safetensors', not the name of a safetensors file"],
    ),
    "index that is wrong": (
        "per expert",
        lambda d: map_wrongly(d, SHARDED, "model-00001-of-00009.safetensors"),
        [f"model-00001-of-00009.safetensors has no tensor {SHARDED}"],
    ),
    "index that lacks a tensor": (
        "per expert",
        forget,
        [f"has a tensor {SHARDED}, which", "does not list"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_is_named(tmp_path, damage):
    layout, change, words = DAMAGE[damage]
    directory = copy(tmp_path, layout=layout)
    change(directory)
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(directory) in str(error.value)
    for word in words:
        assert word in str(error.value)


LOADING = """
import sys, jax
from pathlib import Path
from aoe_jax.formats.loading import load_params, read_config
from aoe_jax.sharding import fill_mesh, make_mesh

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

directory = Path(sys.argv[1])
config = fill_mesh(read_config(directory), 1)
mesh = make_mesh(config, jax.devices())
jax.block_until_ready(jax.numpy.ones(8))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = peak()
params, _ = load_params(directory, config, mesh)
model = sum(a.nbytes for a in jax.tree.leaves(params))
print(peak() - before, model, params["layers"]["experts"]["w_gate"].nbytes)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_second_copy_is_held(tmp_path, layout):
    """Of 200 MB; beside the model a piece, here one parameter of all layers, and pages of the file
    that is being read.
    """
    directory = copy(tmp_path, layout="fused")
    for file in directory.glob("model*"):
        file.unlink()
    shape = {
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_local_experts": 8,
    }
    change_config(directory, **shape, num_attention_heads=4, num_key_value_heads=4)
    save_file(_large_tensors(layout), directory / "model.safetensors")
    command = [sys.executable, "-c", LOADING, str(directory)]
    found = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert found.returncode == 0, found.stderr
    taken, model, piece = map(int, found.stdout.split())
    assert model > 2e8 and piece < 0.35 * model
    assert taken < model + 2 * piece, f"{taken / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"


def _large_tensors(layout):
    def ones(*shape):
        return np.ones(shape, np.float32)

    tensors = {
        "model.embed_tokens.weight": ones(96, 512),
        "lm_head.weight": ones(96, 512),
        "model.norm.weight": ones(512),
    }
    for layer in range(4):
        name = f"model.layers.{layer}."
        tensors |= {f"{name}self_attn.{letter}_proj.weight": ones(512, 512) for letter in "qkvo"}
        tensors |= {
            f"{name}{norm}_layernorm.weight": ones(512) for norm in ("input", "post_attention")
        }
        if layout == "fused":
            tensors |= {f"{name}mlp.experts.gate_up_proj": ones(8, 2048, 512)}
            tensors |= {
                f"{name}mlp.experts.down_proj": ones(8, 512, 1024),
                f"{name}mlp.gate.weight": ones(8, 512),
            }
            continue
        tensors[f"{name}block_sparse_moe.gate.weight"] = ones(8, 512)
        for expert in range(8):
            each = f"{name}block_sparse_moe.experts.{expert}."
            tensors |= {f"{each}w1.weight": ones(1024, 512), f"{each}w3.weight": ones(1024, 512)}
            tensors |= {f"{each}w2.weight": ones(512, 1024)}
    return tensors

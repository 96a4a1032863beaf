"""Models are read from files piece by piece; errors name what is wrong."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats import tensor_files
from aoe_jax.formats.loading import read_config
from configs import finetune
from tests.formats.test_writing import loaded, written
from tests.runs import finish, start, tiny_config

pytestmark = pytest.mark.usefixtures("ragged")

EXPERTS = "model.layers.1.block_sparse_moe.experts"
SHARDED = f"{EXPERTS}.3.w2.weight"
NORM = "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"


ROUTER = tiny_config(experts__kind="router", experts__d_ffn=24)


def load(directory, dtype=None):
    return loaded(directory, dtype)[0]


def change_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in values.items() if value != "removed"}
    path.write_text(json.dumps(kept))


def edit(directory, file="model.safetensors", **changes):
    """Changes tensors, `None` removes one."""
    tensors = load_file(directory / file) | changes
    save_file({name: a for name, a in tensors.items() if a is not None}, directory / file)


def shard_of(directory):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][SHARDED]


def truncate(directory):
    os.truncate(shard_of(directory), shard_of(directory).stat().st_size - 1)


def map_to_a_parent(directory):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][SHARDED] = "../x.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


ONE = np.ones(32, np.float32)
IN_ONE_FILE = [
    (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lambda d: (d / "config.json").unlink(), "config.json cannot be read (No such file"),
    (lambda d: edit(d, **{NORM: None}), f"tensor {NORM} is missing"),
    (lambda d: edit(d, **{SHARDED: None}), f"tensor {SHARDED} is missing"),
    (lambda d: edit(d, more=ONE), "model.safetensors: tensor more is unknown"),
    (lambda d: edit(d, **{NORM: np.ones(33, np.float32)}), f"{NORM} is [33], by config.json [32]"),
    (
        lambda d: edit(d, **{SHARDED: np.ones((24, 32), np.float32)}),
        f"tensor {SHARDED} is [24, 32], by config.json [32, 24]",
    ),
    (
        lambda d: edit(d, **{NORM: ONE.astype(np.float16)}),
        f"{NORM} of float16 must be of the same type",
    ),
    (
        lambda d: edit(d, **{NORM: ONE.astype(np.int8)}),
        f"model.safetensors: tensor {NORM} is of type I8; only F32, F16, BF16",
    ),
    (lambda d: (d / "model.safetensors").write_text("hello"), "cannot be read"),
]
IN_SHARDS = [
    (truncate, ".safetensors cannot be read"),
    (lambda d: shard_of(d).unlink(), "is missing; model.safetensors.index"),
    (lambda d: (d / INDEX).write_text("{}"), "weight_map is None, not an object"),
    (map_to_a_parent, f"['{SHARDED}'] is '../x.safetensors', not the name of a safetensors file"),
]


@pytest.mark.parametrize(("damage", "words"), [*IN_ONE_FILE, *IN_SHARDS])
def test_refused_by_name(tmp_path, monkeypatch, damage, words):
    if (damage, words) in IN_SHARDS:
        monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    directory = written(tmp_path, ROUTER)[0]
    damage(directory)
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(directory) in str(error.value) and words in str(error.value)


def test_code_in_the_directory_is_not_run(tmp_path):
    directory, marker = written(tmp_path, ROUTER)[0], tmp_path / "run"
    for name in ("custom", "__init__"):
        (directory / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    auto_map["AutoTokenizer"] = ["custom.Tokenizer", None]
    change_config(directory, auto_map=auto_map)
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    train_tokenizer(["the state of the union"] * 9, 300).save(directory)
    assert load_model(directory).config.experts.kind == "router"
    finetune.get_config(str(directory))
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_dtype_of_the_file_stays(tmp_path, dtype):
    directory = written(tmp_path, ROUTER)[0]
    file = directory / "model.safetensors"
    tensors = {name: a.astype(dtype) for name, a in load_file(file).items()}
    save_file(tensors, file)
    of_model = "bfloat16" if dtype == ml_dtypes.bfloat16 else "float32"
    assert read_config(directory).model.dtype == of_model
    params = load(directory)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    w_gate = np.asarray(params["layers"]["experts"]["w_gate"])[1, 3]
    np.testing.assert_array_equal(w_gate.T, tensors[f"{EXPERTS}.3.w1.weight"])
    cast = load(directory, jnp.float32)["layers"]["experts"]["w_gate"]
    assert cast.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(cast)[1, 3], w_gate.astype(np.float32))


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


@pytest.mark.slow
def test_no_second_copy_is_held(tmp_path):
    """Beside the model of 200 MB, memory has one parameter of all layers, and pages of a file."""
    shape = {"model__n_layers": 4, "model__d_model": 512, "experts__d_ffn": 1024}
    directory = written(
        tmp_path, tiny_config(experts__kind="router", experts__n_experts=8, **shape)
    )[0]
    status, stdout, stderr = finish(start(["-c", LOADING, str(directory)], forked=False))
    assert status == 0, stderr
    taken, model, piece = map(int, stdout.split())
    assert model > 2e8 and piece < 0.35 * model
    assert taken < model + 2 * piece, f"{taken / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"

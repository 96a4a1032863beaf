"""The first state of a run that starts from a model."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch
from aoe_jax.training.starting import state_from_model
from aoe_jax.training.step import train_step_on
from benchmarks.parity import TOKENS
from configs import finetune
from tests.formats.hub import hub_models
from tests.formats.test_tokenizer_files import byte_level, with_a_first_token
from tests.formats.test_writing import written
from tests.runs import tiny_config

pytestmark = pytest.mark.usefixtures("ragged")


def first_state(directory, tokenizer, mesh=None, **changes):
    config = tiny_config(train__init_from=str(directory), **changes)
    n_devices = 8 if mesh else 1
    config = fill_mesh(dataclasses.replace(config, mesh=mesh or MeshConfig()), n_devices)
    mesh = make_mesh(config, jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        _, like = train_step_on(mesh, config)
        state = state_from_model(config, mesh, like, tokenizer)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like))
    return state


@pytest.fixture
def tokenizer(tmp_path):
    byte_level(tmp_path)
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, expert=2)])
def test_parameters_of_the_model_and_the_rest_anew(tmp_path, tokenizer, mesh):
    changes = {"balance__bias_rate": 0.01, "train__batch_size": 8}
    directory, params, bias, *_ = written(tmp_path, tiny_config(**changes), "bfloat16")
    state = first_state(directory, tokenizer, mesh, **changes)
    expected = jax.tree.map(lambda a: np.asarray(a.astype("bfloat16").astype("float32")), params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected)
    np.testing.assert_array_equal(state.routing_state["selection_bias"], bias["selection_bias"])
    assert {a.dtype.name for a in jax.tree.leaves(state.params)} == {"float32"}
    assert int(state.step) == 0 and all(not np.any(a) for a in jax.tree.leaves(state.opt_state))


@pytest.mark.slow
def test_a_model_of_the_hub_trains_on(tokenizer):
    """The first loss is that of the hub's model, and a step lowers the loss of the same batch."""
    folders, logits = hub_models()["dots1"]
    config = finetune.get_config(str(folders["fused"]))
    config.model.dtype = "float32"
    config.data.seq_len = TOKENS.shape[1]
    config.train.update(batch_size=len(TOKENS), steps=2, warmup=0.0, learning_rate=1e-3)
    config.balance.aux_weight = 0.0
    config = fill_mesh(Config.from_config_dict(config), 1)
    mesh = make_mesh(config, jax.devices()[:1])
    inputs, targets = TOKENS.astype(np.int32), np.roll(TOKENS, -1, axis=1).astype(np.int32)
    batch = {"inputs": inputs, "targets": targets, "segment_ids": np.ones_like(inputs)}
    batch = put_batch(batch_sharding(mesh), batch | {"weights": np.ones(TOKENS.shape, np.float32)})
    with jax.set_mesh(mesh):
        step, like = train_step_on(mesh, config)
        state = state_from_model(config, mesh, like, tokenizer)
        state, before = step(state, batch)
        _, after = step(state, batch)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    assert float(before["nll"]) == pytest.approx(float(expected), abs=1e-4)
    assert float(after["nll"]) < float(before["nll"]) - 0.01


def test_what_may_differ(tmp_path, tokenizer, caplog):
    """The choice of experts and the special tokens that a tokenizer adds to texts may differ."""
    directory, *_ = written(tmp_path, tiny_config())
    with_a_first_token(directory)
    with caplog.at_level("WARNING"):
        state = first_state(directory, tokenizer, experts__top_k=3, balance__bias_rate=0.01)
    assert "config.experts.top_k is 2 there, 3 here" in caplog.text
    assert not np.any(state.routing_state["selection_bias"])  # the model has no bias


def with_another_tokenizer(directory):
    byte_level(directory)
    file = directory / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["merges"].pop()
    file.write_text(json.dumps(spec))


def without_weights(directory):
    (directory / "model.safetensors").unlink()


BIAS, ROUTER = {"balance__bias_rate": 0.01}, {"experts__kind": "router"}
MISTAKES = [  # (settings of the model, settings of the run, change of files, words of the error)
    ({}, {"experts__d_ffn": 64}, None, "is another model: config.experts.d_wide is"),
    ({}, ROUTER, None, "config.experts.kind is 'aoe' there, 'router' here"),
    (BIAS, {}, None, "selection bias, which this run cannot use; set routing.name and"),
    ({}, {}, with_another_tokenizer, "another tokenizer than the corpora; set data.tokenizer="),
    ({}, {}, without_weights, "neither model.safetensors nor"),
]


@pytest.mark.parametrize(("of_model", "of_run", "change", "words"), MISTAKES)
def test_refused_by_name(tmp_path, tokenizer, of_model, of_run, change, words):
    directory, *_ = written(tmp_path, tiny_config(**of_model))
    if change:
        change(directory)
    with pytest.raises(UserError) as error:
        first_state(directory, tokenizer, **of_run)
    assert str(error.value).startswith(f"config.train.init_from='{directory}': ")
    assert words in str(error.value)

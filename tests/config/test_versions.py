"""Configurations that earlier versions of this program stored."""

import json
from pathlib import Path

import pytest

from aoe_jax.config import VERSION
from aoe_jax.config.data import DataConfig
from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import from_json
from aoe_jax.moe.routing import TopK

STORED = {file.stem: file for file in Path(__file__).with_name("stored").glob("*.json")}
FIRST = json.loads(STORED["version_1"].read_text())


@pytest.mark.parametrize("name", STORED)
def test_a_configuration_of_each_version(name):
    """Each group has a value that is no default."""
    changed = Config(
        model=ModelConfig(n_layers=3, dtype="bfloat16", qk_norm="all"),
        experts=ExpertsConfig(top_k=3, d_low=32),
        routing=TopK(norm_topk_prob=False),
        balance=BalanceConfig(aux_weight=0.5),
        data=DataConfig(seq_len=128),
        train=TrainConfig(steps=7),
        checkpoint=CheckpointConfig(keep=4),
        mesh=MeshConfig(fsdp=2),
    )
    stored = json.loads(STORED[name].read_text())
    assert Config.from_stored(stored) == changed
    assert stored == json.loads(STORED[name].read_text())  # the argument does not change


def test_the_number_of_this_version():
    assert json.loads(STORED[f"version_{VERSION}"].read_text())["version"] == VERSION


def test_a_model_of_the_first_version():
    groups = {name: FIRST[name] for name in ("model", "experts", "routing")}
    config = from_json({"model_type": "aoe"} | groups)
    assert (config.experts.top_k, config.routing) == (3, TopK(norm_topk_prob=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 99}, "version=99: this program reads 1 to 2; update it"),
        ({"version": "2"}, "version='2': "),
        ({"version": True}, "version=True: "),
        ({"model": FIRST["model"] | {"norm": "layer"}}, "config.model.norm='layer': only 'rms' is"),
        ({"routing": {"name": "da_moe", "measure": "all"}}, "config.routing.measure='all': only"),
        ({"model": 7}, "model is no group of fields"),
        ({"experts": {"selection": "top_k"}}, "config.experts.selection is unknown"),
    ],
)
def test_what_cannot_be_brought_forward(changes, words):
    with pytest.raises(UserError) as error:
        Config.from_stored(FIRST | changes)
    assert str(error.value).startswith(words)

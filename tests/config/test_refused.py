"""Configurations that are refused: the error names the field, its value and what would be right."""

import ast
import dataclasses

import pytest

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.methods import all_methods

# A line is `GROUP.FIELD=VALUE; ... => MESSAGE`. The error starts with the first field and its value
# and contains MESSAGE. With `=> START ... MESSAGE` it starts with START instead.
REFUSED = """
mesh.data=0 => -1 for all remaining devices
mesh.expert=3 => must divide experts.n_experts=8
mesh.tensor=8 => must divide model.n_heads=4
mesh.fsdp=3 => must divide model.d_model=128
mesh.fsdp=64 => must divide experts.d_low=42
experts.d_low=32; mesh.fsdp=32 => train.batch_size=16 ... mesh.data * mesh.fsdp * mesh.expert = 32
mesh.transport=all_to_all => set mesh.expert
experts.top_k=9 => n_experts=8
experts.d_low=128 => smaller than model.d_model=128
experts.kind=moe => aoe, router, dense, capacity
experts.score_neurons=600 => experts.d_ffn=512
experts.score_neurons=4; experts.kind=router => kind='aoe'
experts.score=max; experts.kind=router => leave it at norm
experts.d_wide=99; experts.kind=router => d_ffn
experts.round_to=128; experts.kind=router => d_ffn
experts.round_to=8; experts.d_wide=64 => Eq. 5
experts.large_router=True; experts.kind=router; experts.factorised_gate=True => an ablation
mesh.tensor=4; experts.d_ffn=519; experts.d_low=32 => experts.d_wide=678; set experts.round_to
experts.d_ffn=8 => Eq. 5 finds no width for d_low=42
experts.round_to=4096 => experts.d_ffn=512 ... round_to=4096
experts.kind=dense => balance.aux_weight=0.01 ... set it to 0
experts.factorised_gate=True => kind='router'
experts.d_shared=8; experts.kind=dense => for experts.kind='aoe' or
experts.shared_gate=True => experts.d_shared
model.qkv_bias=True; model.attention_bias=True => set one of them
model.n_heads=3 => d_model=128
model.n_heads=128 => even width
model.n_layers=2.5 => int
model.layers=2 => model.layers is unknown ... n_layers
experts.gradient_sums=bfloat16; experts.kind=dense => 'aoe' or 'router'
balance.aux_tokens=0.3 => 1 / a whole number
balance.aux_batch=sequence; balance.aux_weight=0.0 => leave it at 'global'
data.name='' => sotu
data.name=text => data.path=None ... folder of .txt files
data.tokenizer='' => is empty
train.init_from='' => is empty
data.name=prepared => data.path=None ... name the folder of a token store
data.path=/a; data.name=sotu, text@/b => leave it at None
data.path=/a => is not for data.name='sotu'; set data.name
data.name=sotu, text => as text@FOLDER
data.name=sotu, prepared => as prepared@FOLDER
data.name=sotu,,lm1b => sotu=1, c4=3
data.name=sotu, text@ => text@ lacks its path
data.name=sotu=1, lm1b => every corpus a weight, or none
data.name=sotu=1, lm1b=much => the weight 'much' of lm1b must be a number
data.name=sotu=1, lm1b=0 => the weight '0' of lm1b must be a number from 1e-15 to 1e15
data.name=sotu=1e16 => from 1e-15 to 1e15
data.name=sotu=1e-2000000000 => 1e-15 to 1e15
data.name=text@/a, sotu, text@/a/ => text is named twice
model.rope_share=0.1 => an even number of the 32 features
model.d_dense=64 => n_dense_layers=0 layers; set both
model.n_dense_layers=1 => model.d_dense=None ... n_dense_layers=1 layers; set both
data.loss_mask=1 => bool
data.seq_len=4096 => max_len=2048
train.accumulate=3 => batch_size=16
train.batch_size=33554432 => raise train.accumulate
train.router_steps=5 => experts.kind='aoe' has none
train.final_learning_rate=1.0 => must be at most train.learning_rate=0.003
routing.name=topk => ; did you mean top_k?
routing.name=top_q => top_k, top_p, expert_choice, sparsemixer
routing.name=missing.py:Close => there is no file
routing.name=examples/add_a_method.py:Close => no dataclass Close that inherits from
routing.name=examples/add_a_method.py:Method => no dataclass Method that inherits from
routing.name=examples/add_a_method.py:AboveMean; experts.kind=dense => choose one of dense
routing.name=configs/compare/scores.py:FixedK => no dataclass FixedK that inherits from
routing.name=configs/compare/scores.py:SelfRouting; experts.kind=router; experts.n_experts=200 \
=> raise model.d_model
routing.name=configs/compare/scores.py:MPI; experts.kind=aoe => needs whole gates
routing.name=configs/compare/scores.py:MPI; experts.kind=router; mesh.fsdp=2 => on meshes that split
routing.name=top_k; routing.p=0.5 => routing.p is unknown ... norm_topk_prob
routing.capacity_factor=9.0; routing.name=expert_choice => n_experts=8
routing.name=expert_choice; experts.kind=capacity => choose one of capacity
routing.name=thor => choose one of top_k
experts.score_gradient=sparse; routing.name=top_k; routing.norm_topk_prob=False => use 'dense'
experts.score_neurons=16; experts.d_ffn=32; mesh.tensor=4 => experts.d_ffn / mesh.tensor = 8
experts.score=max; routing.name=dynmoe; balance.aux_weight=0.0 => use 'norm'
train.scoring_rate=0.3; experts.kind=uoe => experts.kind='uoe'; leave it at 1
routing.initial_experts=9; routing.name=dynmoe; balance.aux_weight=0.0 => n_experts=8
routing.period_steps=500; routing.name=dynmoe; balance.aux_weight=0.0 => record_steps = 600
routing.loss_weight=0.1; routing.name=dynmoe; balance.aux_weight=0.0 => kind='router'
routing.bias=nan; routing.name=routing_free => must be finite
routing.name=dynmoe => balance.aux_weight=0.01 ... set it to 0
balance.entropy_weight=0.1; routing.name=dynmoe; balance.aux_weight=0 => set it to 0
experts.large_router=True; routing.name=dynmoe; balance.aux_weight=0.0; experts.kind=router \
=> columns
experts.top_k=3; routing.name=gshard => set 2
model.n_dense_layers=1; model.d_dense=64; experts.kind=dense => set it to 0
routing.name=erc => experts.kind='router'
balance.bias_rate=0.01; routing.name=top_p => biases the choice
balance.aux_tokens=0.125; balance.aux_batch=sequence; data.seq_len=100 => divide data.seq_len=100
model.remat=experts; experts.kind=dense; balance.aux_weight=0.0 => is for layers of experts
model.unroll=2; model.remat=layer => with remat='layer', unrolled
model.unroll=2; mesh.fsdp=4 => with mesh.fsdp=4, unrolled
routing.segment=0; experts.kind=smear; balance.aux_weight=0.0 => at least 2 in a decoder
routing.segment=256; experts.kind=smear; balance.aux_weight=0.0 => below data.seq_len=256
data.document_mask=True; experts.kind=smear; balance.aux_weight=0.0 => is not implemented
experts.kind=smear => balance.aux_weight=0.01 ... a smear layer has no load
mesh.transport=all_to_all; experts.kind=smear; balance.aux_weight=0.0; mesh.expert=2 => is not
balance.aux_weight=0.01; routing.name=gshard => is the balance loss of both choices, and
routing.norm_topk_prob=False; experts.kind=uoe; routing.p=0.5 => is top-p routing; leave it at True
experts.kind=uoe; experts.top_k=1 => routing.routing_neurons=None ... comes to 512
routing.routing_neurons=512; experts.kind=uoe => must be at least 1
routing.routing_neurons=0; experts.kind=uoe => must be at least 1
mesh.tensor=4; experts.kind=uoe; routing.routing_neurons=30 => must divide routing_neurons=30
routing.name=erc; experts.kind=router; experts.factorised_gate=True => couples the columns of a
routing.name=erc; experts.kind=router; experts.large_router=True => couples the columns of a plain
routing.name=erc; experts.kind=router; experts.n_experts=1; experts.top_k=1 => of several experts
experts.kind=aoe; routing.name=sigmoid_top_k => routing.name='sigmoid_top_k' ... is for a plain
routing.name=sigmoid_top_k; experts.kind=router; experts.large_router=True => is for a plain
routing.n_groups=3; experts.kind=router; routing.name=sigmoid_top_k => divide experts.n_experts=8
routing.n_groups=8; experts.kind=router; routing.name=sigmoid_top_k => groups of at least 2
routing.n_groups=4; experts.top_k=3; experts.kind=router; routing.name=sigmoid_top_k \
=> routing.groups_per_token=1 ... leaves 2 experts
routing.groups_per_token=2; experts.kind=router; routing.name=sigmoid_top_k => routing.n_groups=1
routing.name=quantile; balance.bias_rate=0.01 => has its own bias; set balance.bias_rate=0
routing.name=quantile; experts.top_k=8 => set experts.top_k below experts.n_experts
balance.z_weight=0.001; experts.kind=router; routing.name=sigmoid_top_k => is not implemented
"""


def value_of(text):
    try:
        return float("nan") if text == "nan" else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    settings, _, wanted = case.partition(" => ")
    groups = {}
    for setting in settings.split("; "):
        name, _, value = setting.partition("=")
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value_of(value)
    start, has_start, message = wanted.rpartition(" ... ")
    if not has_start:
        name, value = settings.split("; ")[0].split("=", 1)
        start = f"{name}={value_of(value)!r}"
    with pytest.raises(UserError) as error:
        Config.from_config_dict(groups)
    assert str(error.value).startswith(f"config.{start}"), error.value
    assert message in str(error.value).removeprefix(f"config.{start}"), error.value


GROUPS = [field.type for field in dataclasses.fields(Config) if field.name != "routing"]
BEYOND = {"above": 0, "at_least": -1, "below": 0, "at_most": 1}


@pytest.mark.parametrize("group", [*GROUPS, *all_methods().values()])
def test_values_beyond_their_bounds_are_refused(group):
    """Checks every field that is declared with choices or with numbers as bounds."""
    for field in dataclasses.fields(group):
        bounds = (field.metadata.get("bounds") or {}).items()
        wrong = [n + BEYOND[kind] for kind, n in bounds if not isinstance(n, str)]
        for value in wrong + ["another"] * bool(field.metadata.get("choices")):
            with pytest.raises(UserError) as error:
                group(**{field.name: value})
            start = f"config.{group.group}.{field.name}={value!r}: "
            assert str(error.value).startswith((start + "must be ", start + "choose one of "))


def test_an_unknown_group():
    with pytest.raises(UserError, match="config.optimizer is unknown; known are model, experts"):
        Config.from_config_dict({"optimizer": {}})

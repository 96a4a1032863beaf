"""Configurations from one form to the other, and those that are refused."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import as_own, computed_fields, from_json, to_json
from aoe_jax.formats.loading import read_config
from aoe_jax.moe.routing import TopK, state_shapes
from tests.runs import tiny_config

METHOD = "examples/add_a_method.py:AboveMean"
MIXTRAL = to_json(tiny_config(experts__kind="router"))


def router(model_type, **changes):
    return model_type, {"experts__kind": "router"} | changes


# The model_type in which an experiment here is written, and its changes.
VARIANTS = {
    "aoe": ("aoe", {}),
    "aoe by rounded Eq. 5": ("aoe", {"experts__round_to": 8}),
    "aoe, over all": ("aoe", {"routing__norm_topk_prob": False}),
    "whole gates": ("aoe", {"experts__score_neurons": 4, "experts__score": "max"}),
    "aoe, shared expert": ("aoe", {"experts__d_shared": 24}),
    "aoe, dense layers in front": ("aoe", {"model__n_dense_layers": 1, "model__d_dense": 24}),
    "aoe, dynmoe": ("aoe", {"routing__name": "dynmoe", "routing__temperature": 2.0}),
    "router": router("mixtral"),
    "router, bfloat16": router("mixtral", model__dtype="bfloat16", model__remat="experts"),
    "router, untied": router("mixtral", model__tie_embeddings=False),
    "router, grouped queries": router("mixtral", model__n_kv_heads=1, model__rope_base=1e6),
    "router, over all": router("aoe", routing__norm_topk_prob=False),
    "router, factorised": router("aoe", experts__factorised_gate=True),
    "router, large": router("aoe", experts__large_router=True),
    "router, da_moe": router(
        "aoe", routing__name="da_moe", experts__top_k=3, routing__reduce="max"
    ),
    "router, routing-free": router("aoe", routing__name="routing_free", routing__threshold=0.5),
    "router, biases": router("aoe", model__attention_bias=True),
    "router, norm over heads": router("olmoe", model__qk_norm="all", routing__norm_topk_prob=False),
    "router, shared expert": router("aoe", experts__d_shared=24),
    "router, shared expert with a gate": router(
        "qwen2_moe",
        experts__d_shared=24,
        experts__shared_gate=True,
        model__qkv_bias=True,
        routing__norm_topk_prob=False,
    ),
    "router, norms of heads": router("qwen3_moe", model__qk_norm="head", model__head_dim=20),
    "router, dense layers in front": router(
        "dots1",
        routing__name="sigmoid_top_k",
        routing__n_groups=2,
        routing__scale=2.5,
        model__n_dense_layers=1,
        model__d_dense=24,
        model__qk_norm="head",
        experts__d_shared=64,
    ),
    "router, part of the head": router(
        "glm4_moe",
        routing__name="sigmoid_top_k",
        routing__norm_topk_prob=False,
        model__rope_share=0.5,
        model__qkv_bias=True,
        model__tie_embeddings=False,
        model__rope_factors=(1.0, 1.5, 2.0, 4.0),
        experts__d_shared=32,
    ),
    "router, sigmoid without a shared expert": router("aoe", routing__name="sigmoid_top_k"),
    "router, rotary factors": router(
        "mixtral", model__rope_factors=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
    ),
    "dense": ("llama", {"experts__kind": "dense"}),
    "dense, norms of heads": ("qwen3", {"experts__kind": "dense", "model__qk_norm": "head"}),
    "dense, biases": ("aoe", {"experts__kind": "dense", "model__qkv_bias": True}),
    "capacity": ("aoe", {"experts__kind": "capacity", "routing__capacity_factor": 1.25}),
    "uoe": ("aoe", {"experts__kind": "uoe", "experts__top_k": 3}),
    "smear, longer than a window": (
        "aoe",
        {"experts__kind": "smear", "routing__segment": 1500, "balance__aux_weight": 0.0}
        | {"data__seq_len": 2048, "model__max_len": 2048},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant):
    model_type, changes = VARIANTS[variant]
    config = tiny_config(**changes)
    state = state_shapes(config.routing, config.experts, config.balance, config.model.d_model)
    values = json.loads(json.dumps(to_json(config, state)))
    assert values["model_type"] == model_type
    for form in (values, json.loads(json.dumps(as_own(config)))):
        found = from_json(form)
        assert computed_fields(found) == computed_fields(config)
        assert found.model.max_len == config.model.max_len


def test_fields_without_an_effect_do_not_count():
    config = tiny_config(experts__kind="router")
    changes = {"unroll": 2, "dtype": "bfloat16", "max_len": 128, "n_kv_heads": config.model.n_heads}
    experts = dataclasses.replace(config.experts, d_low=4)
    model = dataclasses.replace(config.model, **changes)
    other = dataclasses.replace(config, experts=experts, model=model)
    assert computed_fields(config) == computed_fields(other)
    fewer = dataclasses.replace(config, experts=dataclasses.replace(config.experts, top_k=1))
    assert computed_fields(config) != computed_fields(fewer)


def test_a_mixtral_of_the_hub():
    """The published file has fields that transformers has no more; other groups have defaults."""
    values = json.loads("""{
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}""")
    found, usual = from_json(values), Config()
    model, e = found.model, found.experts
    assert (model.d_model, model.kv_heads, model.rope_base) == (4096, 8, 1e6)
    assert (model.tie_embeddings, model.max_len) == (False, 32768)
    assert (e.kind, e.n_experts, e.d_ffn, found.routing) == ("router", 8, 14336, TopK())
    for group in ("train", "checkpoint", "balance"):
        assert getattr(found, group) == getattr(usual, group)
    # The window of the data is no longer than the model takes, and that of attention no shorter.
    assert from_json(MIXTRAL | {"sliding_window": 64}).data.seq_len == 64


def changed(**changes):
    return {name: value for name, value in (MIXTRAL | changes).items() if value != "removed"}


OLMOE = changed(model_type="olmoe", num_experts=4)
QWEN3_MOE = changed(model_type="qwen3_moe", num_experts=4, moe_intermediate_size=32)
DOTS = changed(model_type="dots1", n_routed_experts=4, moe_intermediate_size=32, n_shared_experts=1)
LLAMA = changed(model_type="llama")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PRETRAINED = {"original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "attention_factor": 1.0}
ROPE = LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
SLIDING = ["full_attention", "sliding_attention"]
NO = "is not implemented"


def own(**groups):
    return {"model_type": "aoe"} | {"model": {}, "experts": {}, "routing": {}} | groups


REFUSED = [
    (changed(model_type="gpt2"), "model_type='gpt2' is unknown; known are mixtral, olmoe, qwen2_m"),
    (DOTS | {"first_k_dense_replace": 2}, "replace=2 must be a whole number below num_hidden_la"),
    (DOTS | {"n_shared_experts": None}, "n_shared_experts=None must be"),
    (DOTS | {"moe_layer_freq": 2}, f"moe_layer_freq=2 {NO}; only 1 is"),
    (
        DOTS | {"model_type": "glm4_moe", "use_qk_norm": 3},
        "config.model.qk_norm=3: choose one of none, all, head",
    ),
    (changed(model_type="removed"), "has no model_type; `python -m aoe_jax.export`"),
    (changed(model_type=["mixtral"]), "model_type=['mixtral'] is no text"),
    (changed(hidden_size="removed"), "hidden_size is missing; a model of model_type 'mixtral'"),
    (changed(hidden_size="wide"), "config.model.d_model='wide'"),
    (OLMOE | {"head_dim": 64}, f"head_dim=64 {NO}"),
    (LLAMA | {"head_dim": 2**21}, "head_dim=2097152: must be"),
    (QWEN3_MOE | {"layer_types": SLIDING}, f"layer_types={SLIDING} {NO}; only 'full_attention' in"),
    (QWEN3_MOE | {"layer_types": ["full_attention", ["x"]]}, f"['full_attention', ['x']] {NO}"),
    (QWEN3_MOE | {"mlp_only_layers": [0]}, f"mlp_only_layers=[0] {NO}; only [] or None is"),
    (QWEN3_MOE | {"use_sliding_window": True}, f"use_sliding_window=True {NO}; only False is"),
    (changed(hidden_act="gelu"), f"hidden_act='gelu' {NO}; only 'silu'"),
    (changed(sliding_window=63), f"sliding_window=63 {NO}; only one of at least 64"),
    (changed(quantization_config={"bits": 4}), f"quantization_config={{'bits': 4}} {NO}"),
    (OLMOE | {"clip_qkv": 8.0}, f"clip_qkv=8.0 {NO}; only None"),
    (changed(rope_scaling={"type": "yarn", "factor": 4.0}), f"rope_type='yarn' {NO}"),
    (changed(rope_parameters=LLAMA3), f"rope_type='llama3' {NO}"),
    (LLAMA | {"rope_parameters": LLAMA3}, "original_max_position_embeddings=None must be a numb"),
    (
        LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}} | PRETRAINED,
        "low_freq_factor=1.0 must be below high_freq_factor=1.0",
    ),
    (changed(rope_parameters=LONGROPE), "short_factor=None must be a list of numbers"),
    (changed(rope_scaling=ROPE | {"short_factor": ["a"]}), "short_factor=['a'] must be a list of"),
    (changed(rope_scaling=ROPE | {"attention_factor": 1.2}), f"attention_factor=1.2 {NO}; only 1"),
    (changed(rope_scaling=ROPE | {"long_factor": [2.0]}), f"long_factor=[2.0] {NO}; only the"),
    (
        changed(rope_scaling=ROPE | {"short_factor": [1.0], "long_factor": [1.0]}),
        "config.model.rope_factors=(1.0,): must be 8 numbers",
    ),
    (changed(rope_theta=float("inf"), rope_parameters="removed"), "config.model.rope_base=inf"),
    (changed(rope_parameters={"full": {"rope_theta": 5.0}}), "only one setting for all layers"),
    (changed(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ({"model_type": "aoe", "model": {}}, "no group 'experts'"),
    (own(routing={"name": METHOD}), f"routing.name='{METHOD}' is a Python file; a model cannot"),
    (own(model={"depth": 3}), "config.model.depth is unknown; known are n_layers"),
    (own(model={"rope_factors": ["a"] * 32}), "config.model.rope_factors=('a', "),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(values, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert f"{tmp_path}/config.json: " in str(error.value) and words in str(error.value)


def test_no_code_in_the_run_of_a_model(tmp_path):
    """A model can neither name a Python file nor be written with one."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    groups = tiny_config(experts__kind="router").to_stored() | {"routing": {"name": METHOD}}
    (tmp_path / "aoe_jax.json").write_text(json.dumps({"config": groups, "step": 3}))
    with pytest.raises(UserError, match=r"aoe_jax\.json: routing\.name=.* is a Python file"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="a model cannot name one"):
        to_json(tiny_config(routing__name=METHOD))


WITHOUT_CLASS = {  # the words that the log must have, and the model
    "routing.name='top_p'": {"routing__name": "top_p"},
    "LlamaForCausalLM lacks model.qkv_bias=True": VARIANTS["dense, biases"][1],
    "MixtralForCausalLM lacks model.attention_bias=True": VARIANTS["router, biases"][1],
    "MixtralForCausalLM lacks selection_bias=True": router("", balance__bias_rate=0.01)[1],
}


@pytest.mark.parametrize("named", WITHOUT_CLASS)
def test_models_without_a_class_are_written_as_our_own(caplog, named):
    config = tiny_config(**WITHOUT_CLASS[named])
    state = state_shapes(config.routing, config.experts, config.balance, config.model.d_model)
    with caplog.at_level(logging.INFO):
        assert to_json(config, state) == as_own(config)
    assert named in caplog.text and "transformers cannot load the model" in caplog.text

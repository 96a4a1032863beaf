"""Configurations from one form to the other, and what is not implemented."""

import dataclasses
import json
import logging

import pytest

from aoe_jax.config.checks import differences
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import as_own, computed_fields, from_json, to_json
from aoe_jax.formats.loading import read_config
from aoe_jax.moe.routing import TopK, state_shapes
from tests.runs import tiny_config

MIXTRAL = to_json(tiny_config(experts__kind="router"))

ROUTER = {"experts__kind": "router"}
SIGMOID = ROUTER | {"routing__name": "sigmoid_top_k"}
# Of an experiment here: the model_type in which it is written.
VARIANTS = {
    "aoe": ({}, "aoe"),
    "aoe by rounded Eq. 5": ({"experts__round_to": 8}, "aoe"),
    "aoe, over all": ({"routing__norm_topk_prob": False}, "aoe"),
    "whole gates": ({"experts__score_neurons": 4, "experts__score": "max"}, "aoe"),
    "router": (ROUTER, "mixtral"),
    "router, bfloat16": (
        ROUTER | {"model__dtype": "bfloat16", "model__remat": "experts"},
        "mixtral",
    ),
    "router, untied": (ROUTER | {"model__tie_embeddings": False}, "mixtral"),
    "router, grouped queries": (
        ROUTER | {"model__n_kv_heads": 1, "model__rope_base": 1e6},
        "mixtral",
    ),
    "router, over all": (ROUTER | {"routing__norm_topk_prob": False}, "aoe"),
    "router, top_p": (ROUTER | {"routing__name": "top_p"}, "aoe"),
    "router, ranked": (ROUTER | {"routing__name": "ranked", "routing__ranks": (1, 3)}, "aoe"),
    "router, factorised": (ROUTER | {"experts__factorised_gate": True}, "aoe"),
    "router, large": (ROUTER | {"experts__large_router": True}, "aoe"),
    "capacity": ({"experts__kind": "capacity", "routing__capacity_factor": 1.25}, "aoe"),
    "router, expert choice": (ROUTER | {"routing__name": "expert_choice"}, "aoe"),
    "router, da_moe": (
        ROUTER | {"routing__name": "da_moe", "experts__top_k": 3, "routing__reduce": "max"},
        "aoe",
    ),
    "router, biases": (ROUTER | {"model__attention_bias": True}, "aoe"),
    "router, norm over heads": (
        ROUTER | {"model__qk_norm": "all", "routing__norm_topk_prob": False},
        "olmoe",
    ),
    "router, shared expert": (ROUTER | {"experts__d_shared": 24}, "aoe"),
    "router, shared expert with a gate": (
        ROUTER
        | {"experts__d_shared": 24, "experts__shared_gate": True}
        | {"model__qkv_bias": True, "routing__norm_topk_prob": False},
        "qwen2_moe",
    ),
    "aoe, shared expert": ({"experts__d_shared": 24}, "aoe"),
    "router, norms of heads": (
        ROUTER | {"model__qk_norm": "head", "model__head_dim": 20},
        "qwen3_moe",
    ),
    "router, dense layers in front": (
        SIGMOID
        | {"model__n_dense_layers": 1, "model__d_dense": 24, "model__qk_norm": "head"}
        | {"routing__n_groups": 2, "routing__scale": 2.5, "experts__d_shared": 64},
        "dots1",
    ),
    "router, part of the head": (
        SIGMOID
        | {"model__rope_share": 0.5, "model__qkv_bias": True, "experts__d_shared": 32}
        | {"routing__norm_topk_prob": False, "model__tie_embeddings": False}
        | {"model__rope_factors": (1.0, 1.5, 2.0, 4.0)},
        "glm4_moe",
    ),
    "router, sigmoid without a shared expert": (SIGMOID, "aoe"),
    "aoe, dense layers in front": ({"model__n_dense_layers": 1, "model__d_dense": 24}, "aoe"),
    "router, rotary factors": (
        ROUTER | {"model__rope_factors": (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)},
        "mixtral",
    ),
    "dense": ({"experts__kind": "dense"}, "llama"),
    "dense, norms of heads": ({"experts__kind": "dense", "model__qk_norm": "head"}, "qwen3"),
    "dense, biases": ({"experts__kind": "dense", "model__qkv_bias": True}, "aoe"),
    "uoe": ({"experts__kind": "uoe", "experts__top_k": 3}, "aoe"),
    "smear, longer than a window": (
        {"experts__kind": "smear", "routing__segment": 1500, "balance__aux_weight": 0.0}
        | {"data__seq_len": 2048, "model__max_len": 2048},
        "aoe",
    ),
    "threshold": ({"routing__name": "threshold", "routing__weights": "relative"}, "aoe"),
    "aoe, dynmoe": ({"routing__name": "dynmoe", "routing__temperature": 2.0}, "aoe"),
    "router, routing-free": (
        ROUTER | {"routing__name": "routing_free", "routing__threshold": 0.5},
        "aoe",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant):
    changes, model_type = VARIANTS[variant]
    config = tiny_config(**changes)
    state = state_shapes(config.routing, config.experts, config.balance, config.model.d_model)
    values = json.loads(json.dumps(to_json(config, state)))
    assert values["model_type"] == model_type
    for form in (values, json.loads(json.dumps(as_own(config)))):
        found = from_json(form)
        assert computed_fields(found) == computed_fields(config)
        assert found.model.max_len == config.model.max_len


def test_what_does_not_matter_does_not_count():
    config = tiny_config(experts__kind="router")
    experts = dataclasses.replace(config.experts, d_low=4)
    model = dataclasses.replace(
        config.model, n_kv_heads=config.model.n_heads, unroll=2, dtype="bfloat16", max_len=128
    )
    other = dataclasses.replace(config, experts=experts, model=model)
    assert computed_fields(config) == computed_fields(other)
    fewer = dataclasses.replace(config, experts=dataclasses.replace(config.experts, top_k=1))
    assert computed_fields(config) != computed_fields(fewer)


def test_a_mixtral_of_the_hub():
    """As published, with fields that transformers has no more."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
    shape |= {"num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768}
    kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu"}
    numbers = {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02}
    unused = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True}
    unused |= {"initializer_range": 0.02, "output_router_logits": False, "sliding_window": None}
    unused |= {"transformers_version": "4.36.0.dev0", "torch_dtype": "bfloat16"}
    found = from_json(shape | kind | numbers | unused | {"tie_word_embeddings": False})
    assert (found.model.d_model, found.model.kv_heads, found.model.rope_base) == (4096, 8, 1e6)
    e = found.experts
    assert (e.kind, e.n_experts, e.d_ffn) == ("router", 8, 14336)
    assert found.routing == TopK()
    assert (found.model.tie_embeddings, found.model.max_len) == (False, 32768)


def changed(**changes):
    return {name: value for name, value in (MIXTRAL | changes).items() if value != "removed"}


OLMOE = changed(model_type="olmoe", num_experts=4)
QWEN3_MOE = changed(model_type="qwen3_moe", num_experts=4, moe_intermediate_size=32)
DOTS = changed(model_type="dots1", n_routed_experts=4, moe_intermediate_size=32, n_shared_experts=1)
LLAMA = changed(model_type="llama")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "attention_factor": 1.0}
REFUSED = [
    (
        changed(model_type="gpt2"),
        "model_type='gpt2' is unknown",
        "mixtral, olmoe, qwen2_moe, qwen3_moe, dots1, glm4_moe, llama, qwen3, aoe",
    ),
    (
        {"model_type": "gpt_oss"},
        "model_type='gpt_oss' is not implemented: its experts and its router have biases",
        "sinks",
    ),
    (
        {"model_type": "deepseek_v3"},
        "model_type='deepseek_v3' is not implemented: its attention is multi-head latent",
    ),
    (
        {"model_type": "deepseek_v2"},
        "model_type='deepseek_v2' is not implemented: its attention is multi-head latent",
    ),
    (
        DOTS | {"first_k_dense_replace": 2},
        "first_k_dense_replace=2: must be a whole number below num_hidden_layers=2",
    ),
    (DOTS | {"first_k_dense_replace": "one"}, "replace='one': must be"),
    (DOTS | {"n_shared_experts": None}, "n_shared_experts=None: must be"),
    (DOTS | {"n_group": 4}, "config.routing.n_groups=4: must divide"),
    (DOTS | {"moe_layer_freq": 2}, "moe_layer_freq=2 is not implemented; only 1 is"),
    (
        DOTS | {"model_type": "glm4_moe", "use_qk_norm": 3},
        "config.model.qk_norm=3: choose one of none, all, head",
    ),
    (changed(model_type="removed"), "has no model_type", "aoe_jax.export"),
    (changed(model_type=["mixtral"]), "model_type=['mixtral'] is no text"),
    (changed(hidden_size="removed"), "hidden_size is missing", "'mixtral'"),
    (changed(hidden_size="wide"), "config.model.d_model='wide'"),
    (changed(num_key_value_heads=3), "n_kv_heads=3", "n_heads"),
    (OLMOE | {"head_dim": 64}, "head_dim=64 is not implemented", "16"),
    (LLAMA | {"head_dim": 2**21}, "head_dim=2097152: must be", "at most"),
    (changed(head_dim=15), "config.model.head_dim=15: must be even"),
    (
        QWEN3_MOE | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=['full_attention', 'sliding_attention'] is not implemented",
        "every layer",
    ),
    (
        QWEN3_MOE | {"layer_types": ["full_attention", ["x"]]},
        "layer_types=['full_attention', ['x']] is not implemented",
    ),
    (
        QWEN3_MOE | {"mlp_only_layers": [0]},
        "mlp_only_layers=[0] is not implemented; only [] or None is",
    ),
    (QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not implemented; only 1 is"),
    (
        QWEN3_MOE | {"use_sliding_window": True},
        "use_sliding_window=True is not implemented; only False is",
    ),
    (changed(hidden_act="gelu"), "hidden_act='gelu' is not implemented", "'silu'"),
    (changed(sliding_window=63), "sliding_window=63 is not implemented", "64"),
    (changed(quantization_config={"bits": 4}), "quantization_config=", "is not implemented"),
    (OLMOE | {"clip_qkv": 8.0}, "clip_qkv=8.0 is not implemented", "None"),
    (OLMOE | {"norm_topk_prob": "yes"}, "norm_topk_prob='yes'", "bool"),
    (
        changed(rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_type='yarn' is not implemented",
        "default",
    ),
    (changed(rope_parameters=LLAMA3), "rope_type='llama3' is not implemented"),
    (
        LLAMA | {"rope_parameters": LLAMA3},
        "original_max_position_embeddings=None: must be a number greater than 0",
    ),
    (
        LLAMA
        | {
            "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0},
            "original_max_position_embeddings": 32,
        },
        "low_freq_factor=1.0 must be below high_freq_factor=1.0",
    ),
    (LLAMA | {"mlp_bias": True}, "mlp_bias=True is not implemented", "only False"),
    (changed(rope_parameters=LONGROPE), "short_factor=None: must be a list of numbers"),
    (
        changed(rope_scaling=LONGROPE | {"short_factor": ["a"]}),
        "short_factor=['a']",
        "list of numbers",
    ),
    (
        changed(rope_scaling=LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
        "long_factor=[2.0, ",
        "is not implemented; only factors equal to short_factor are",
    ),
    (
        changed(
            rope_scaling=LONGROPE
            | {"short_factor": [1.0], "long_factor": [1.0], "attention_factor": 1.2}
        ),
        "attention_factor=1.2 is not implemented; only 1 is",
    ),
    (
        changed(rope_scaling=LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}),
        "config.model.rope_factors=(1.0,)",
        "must be 8 numbers",
    ),
    (changed(rope_parameters={"rope_theta": 5.0}), "rope_theta is 5.0 and 10000.0"),
    (changed(rope_theta=float("inf"), rope_parameters="removed"), "config.model.rope_base=inf"),
    (changed(rope_parameters={"full": {"rope_theta": 5.0}}), "are not implemented"),
    (changed(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ({"model_type": "aoe", "model": {}}, "no group 'experts'"),
    (
        {"model_type": "aoe", "model": {"depth": 3}, "experts": {}, "routing": {}},
        "config.model.depth is unknown; known are n_layers",
    ),
    (
        {"model_type": "aoe", "model": {"rope_factors": ["a"] * 32}, "experts": {}, "routing": {}},
        "config.model.rope_factors=('a', ",
        "numbers greater than 0",
    ),
    (
        {"model_type": "aoe", "model": {}, "experts": {"kind": "soup"}, "routing": {}},
        "config.experts.kind='soup'",
        "aoe, router, dense",
    ),
]


@pytest.mark.parametrize("mistake", REFUSED, ids=lambda mistake: mistake[1])
def test_refused_by_name(mistake, tmp_path):
    values, *words = mistake
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)


def test_a_model_that_no_class_of_transformers_takes_is_written_as_our_own():
    model = {"d_model": 32, "n_heads": 2, "rope_share": 0.5, "qkv_bias": True}
    config = Config.from_config_dict({"model": model, "experts": {"kind": "router"}})
    values = to_json(config)
    assert values == as_own(config)
    assert not differences(computed_fields(from_json(values)), computed_fields(config))


def test_other_groups_are_at_their_defaults():
    found = from_json(MIXTRAL)
    usual = Config()
    for group in ("train", "checkpoint", "balance"):
        assert getattr(found, group) == getattr(usual, group)
    assert found.data.seq_len == 64  # no longer than the model takes


# By the fields that the log must name.
WITHOUT_CLASS = {
    "routing.name='top_p'": {"routing__name": "top_p"},
    "LlamaForCausalLM has no model.qkv_bias=True": {
        "experts__kind": "dense",
        "model__qkv_bias": True,
    },
    "MixtralForCausalLM has no model.attention_bias=True": {
        "experts__kind": "router",
        "model__attention_bias": True,
    },
    "MixtralForCausalLM has no selection_bias=True": ROUTER | {"balance__bias_rate": 0.01},
}


@pytest.mark.parametrize("named", WITHOUT_CLASS)
def test_models_without_a_class(caplog, named):
    with caplog.at_level(logging.INFO):
        config = tiny_config(**WITHOUT_CLASS[named])
        state = state_shapes(config.routing, config.experts, config.balance, config.model.d_model)
        values = to_json(config, state)
    assert "auto_map" not in values and values["model"]["d_model"] == 32
    assert named in caplog.text and "transformers cannot load the model" in caplog.text

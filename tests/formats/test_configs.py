"""Configurations from one form to the other, and what is not implemented."""

import dataclasses
import json
import tracemalloc

import pytest

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import as_own, computed_fields, differences, from_json, to_json
from aoe_jax.formats.reading import read_config
from aoe_jax.moe.routing import TopK, state_shapes
from tests.runs import tiny_config

MIXTRAL = to_json(tiny_config(experts__kind="router"))

SIGMOID = {"experts__kind": "router", "routing__name": "sigmoid_top_k"}
# Of an experiment here: the model_type in which it is written.
VARIANTS = {
    "aoe": ({}, "aoe"),
    "aoe by rounded Eq. 5": ({"experts__round_to": 8}, "aoe"),
    "aoe, over all": ({"routing__norm_topk_prob": False}, "aoe"),
    "whole gates": ({"experts__score_neurons": 4, "experts__score": "max"}, "aoe"),
    "router": ({"experts__kind": "router"}, "mixtral"),
    "router, bfloat16": (
        {"experts__kind": "router", "model__dtype": "bfloat16", "model__remat": "experts"},
        "mixtral",
    ),
    "router, untied": ({"experts__kind": "router", "model__tie_embeddings": False}, "mixtral"),
    "router, grouped queries": (
        {"experts__kind": "router", "model__n_kv_heads": 1, "model__rope_base": 1e6},
        "mixtral",
    ),
    "router, over all": ({"experts__kind": "router", "routing__norm_topk_prob": False}, "aoe"),
    "router, top_p": ({"experts__kind": "router", "routing__name": "top_p"}, "aoe"),
    "router, ranked": (
        {"experts__kind": "router", "routing__name": "ranked", "routing__ranks": (1, 3)},
        "aoe",
    ),
    "router, factorised": ({"experts__kind": "router", "experts__factorised_gate": True}, "aoe"),
    "router, large": ({"experts__kind": "router", "experts__large_router": True}, "aoe"),
    "capacity": ({"experts__kind": "capacity", "routing__capacity_factor": 1.25}, "aoe"),
    "router, expert choice": (
        {"experts__kind": "router", "routing__name": "expert_choice"},
        "aoe",
    ),
    "router, da_moe": (
        {
            "experts__kind": "router",
            "routing__name": "da_moe",
            "experts__top_k": 3,
            "routing__reduce": "max",
        },
        "aoe",
    ),
    "router, biases": ({"experts__kind": "router", "model__attention_bias": True}, "aoe"),
    "router, norm over heads": (
        {"experts__kind": "router", "model__qk_norm": "all", "routing__norm_topk_prob": False},
        "olmoe",
    ),
    "router, shared expert": ({"experts__kind": "router", "experts__d_shared": 24}, "aoe"),
    "router, shared expert with a gate": (
        {"experts__kind": "router", "experts__d_shared": 24, "experts__shared_gate": True}
        | {"model__qkv_bias": True, "routing__norm_topk_prob": False},
        "qwen2_moe",
    ),
    "aoe, shared expert": ({"experts__d_shared": 24}, "aoe"),
    "router, norms of heads": (
        {"experts__kind": "router", "model__qk_norm": "head", "model__head_dim": 20},
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
        {"experts__kind": "router"}
        | {"model__rope_factors": (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)},
        "mixtral",
    ),
    "dense": ({"experts__kind": "dense"}, "llama"),
    "dense, norms of heads": ({"experts__kind": "dense", "model__qk_norm": "head"}, "qwen3"),
    "dense, biases": ({"experts__kind": "dense", "model__qkv_bias": True}, "aoe"),
    "uoe": ({"experts__kind": "uoe", "experts__top_k": 3}, "aoe"),
    "smear, longer than a window": (
        {
            "experts__kind": "smear",
            "routing__segment": 1500,
            "balance__aux_weight": 0.0,
            "data__seq_len": 2048,
            "model__max_len": 2048,
        },
        "aoe",
    ),
    "threshold": ({"routing__name": "threshold", "routing__weights": "relative"}, "aoe"),
    "aoe, dynmoe": ({"routing__name": "dynmoe", "routing__temperature": 2.0}, "aoe"),
    "router, routing-free": (
        {
            "experts__kind": "router",
            "routing__name": "routing_free",
            "routing__threshold": 0.5,
        },
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
    found = from_json(
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
    )
    assert (found.model.d_model, found.model.kv_heads, found.model.rope_base) == (4096, 8, 1e6)
    assert (found.experts.kind, found.experts.n_experts, found.experts.d_ffn) == (
        "router",
        8,
        14336,
    )
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
REFUSED = {
    "unknown architecture": (
        changed(model_type="gpt2"),
        [
            "model_type='gpt2' is unknown",
            "mixtral, olmoe, qwen2_moe, qwen3_moe, dots1, glm4_moe, llama, qwen3, aoe",
        ],
    ),
    "gpt-oss": (
        {"model_type": "gpt_oss"},
        [
            "model_type='gpt_oss' is not implemented: its experts and its router have biases",
            "sinks",
        ],
    ),
    "DeepSeek-V3": (
        {"model_type": "deepseek_v3"},
        ["model_type='deepseek_v3' is not implemented: its attention is multi-head latent"],
    ),
    "DeepSeek-V2": (
        {"model_type": "deepseek_v2"},
        ["model_type='deepseek_v2' is not implemented: its attention is multi-head latent"],
    ),
    "dense layers alone": (
        DOTS | {"first_k_dense_replace": 2},
        ["first_k_dense_replace=2: must be a whole number below num_hidden_layers=2"],
    ),
    "dense layers in words": (DOTS | {"first_k_dense_replace": "one"}, ["replace='one': must be"]),
    "no shared expert": (DOTS | {"n_shared_experts": None}, ["n_shared_experts=None: must be"]),
    "groups of one": (DOTS | {"n_group": 4}, ["config.routing.n_groups=4: must divide"]),
    "every second layer of experts": (
        DOTS | {"moe_layer_freq": 2},
        ["moe_layer_freq=2 is not implemented; only 1 is"],
    ),
    "use_qk_norm": (
        DOTS | {"model_type": "glm4_moe", "use_qk_norm": 3},
        ["config.model.qk_norm=3: choose one of none, all, head"],
    ),
    "no architecture": (changed(model_type="removed"), ["has no model_type", "aoe_jax.export"]),
    "architecture that is no word": (
        changed(model_type=["mixtral"]),
        ["model_type=['mixtral'] is no text"],
    ),
    "missing field": (changed(hidden_size="removed"), ["hidden_size is missing", "'mixtral'"]),
    "word for a number": (changed(hidden_size="wide"), ["config.model.d_model='wide'"]),
    "heads": (changed(num_key_value_heads=3), ["n_kv_heads=3", "n_heads"]),
    "head_dim": (OLMOE | {"head_dim": 64}, ["head_dim=64 is not implemented", "16"]),
    "huge head_dim": (LLAMA | {"head_dim": 2**21}, ["head_dim=2097152: must be", "at most"]),
    "odd head_dim": (changed(head_dim=15), ["config.model.head_dim=15: must be even"]),
    "layer_types": (
        QWEN3_MOE | {"layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types=['full_attention', 'sliding_attention'] is not implemented", "every layer"],
    ),
    "layer_types that are no names": (
        QWEN3_MOE | {"layer_types": ["full_attention", ["x"]]},
        ["layer_types=['full_attention', ['x']] is not implemented"],
    ),
    "some dense layers": (
        QWEN3_MOE | {"mlp_only_layers": [0]},
        ["mlp_only_layers=[0] is not implemented; only [] or None is"],
    ),
    "every second layer dense": (
        QWEN3_MOE | {"decoder_sparse_step": 2},
        ["decoder_sparse_step=2 is not implemented; only 1 is"],
    ),
    "window of Qwen3": (
        QWEN3_MOE | {"use_sliding_window": True},
        ["use_sliding_window=True is not implemented; only False is"],
    ),
    "activation": (changed(hidden_act="gelu"), ["hidden_act='gelu' is not implemented", "'silu'"]),
    "window": (changed(sliding_window=63), ["sliding_window=63 is not implemented", "64"]),
    "quantised": (
        changed(quantization_config={"bits": 4}),
        ["quantization_config=", "is not implemented"],
    ),
    "clip_qkv": (OLMOE | {"clip_qkv": 8.0}, ["clip_qkv=8.0 is not implemented", "None"]),
    "norm_topk_prob": (OLMOE | {"norm_topk_prob": "yes"}, ["norm_topk_prob='yes'", "bool"]),
    "yarn": (
        changed(rope_scaling={"type": "yarn", "factor": 4.0}),
        ["rope_type='yarn' is not implemented", "default"],
    ),
    "llama3 elsewhere": (
        changed(rope_parameters=LLAMA3),
        ["rope_type='llama3' is not implemented"],
    ),
    "llama3 without a length": (
        LLAMA | {"rope_parameters": LLAMA3},
        ["original_max_position_embeddings=None: must be a number greater than 0"],
    ),
    "llama3 of equal frequencies": (
        LLAMA
        | {
            "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0},
            "original_max_position_embeddings": 32,
        },
        ["low_freq_factor=1.0 must be below high_freq_factor=1.0"],
    ),
    "mlp_bias": (LLAMA | {"mlp_bias": True}, ["mlp_bias=True is not implemented", "only False"]),
    "longrope without factors": (
        changed(rope_parameters=LONGROPE),
        ["short_factor=None: must be a list of numbers"],
    ),
    "longrope of words": (
        changed(rope_scaling=LONGROPE | {"short_factor": ["a"]}),
        ["short_factor=['a']", "list of numbers"],
    ),
    "longrope with factors for long texts": (
        changed(rope_scaling=LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
        ["long_factor=[2.0, ", "is not implemented; only factors equal to short_factor are"],
    ),
    "longrope with a scale": (
        changed(
            rope_scaling=LONGROPE
            | {"short_factor": [1.0], "long_factor": [1.0], "attention_factor": 1.2}
        ),
        ["attention_factor=1.2 is not implemented; only 1 is"],
    ),
    "longrope of few numbers": (
        changed(rope_scaling=LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}),
        ["config.model.rope_factors=(1.0,)", "must be 8 numbers"],
    ),
    "rope of two minds": (
        changed(rope_parameters={"rope_theta": 5.0}),
        ["rope_theta is 5.0 and 10000.0"],
    ),
    "base without end": (
        changed(rope_theta=float("inf"), rope_parameters="removed"),
        ["config.model.rope_base=inf"],
    ),
    "rope by kinds of layers": (
        changed(rope_parameters={"full": {"rope_theta": 5.0}}),
        ["are not implemented"],
    ),
    "part of the head": (changed(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    "own without groups": ({"model_type": "aoe", "model": {}}, ["no group 'experts'"]),
    "own, unknown field": (
        {"model_type": "aoe", "model": {"depth": 3}, "experts": {}, "routing": {}},
        ["config.model.depth is unknown; known are n_layers"],
    ),
    "own, rope_factors of words": (
        {"model_type": "aoe", "model": {"rope_factors": ["a"] * 32}, "experts": {}, "routing": {}},
        ["config.model.rope_factors=('a', ", "numbers greater than 0"],
    ),
    "own, wrong value": (
        {"model_type": "aoe", "model": {}, "experts": {"kind": "soup"}, "routing": {}},
        ["config.experts.kind='soup'", "aoe, router, dense"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_by_name(mistake, tmp_path):
    values, words = REFUSED[mistake]
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


def test_many_layers_need_no_memory():
    tracemalloc.start()
    with pytest.raises(UserError, match="layer_types="):
        from_json(QWEN3_MOE | {"layer_types": ["full_attention"], "num_hidden_layers": 2**20})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_other_groups_are_at_their_defaults():
    found = from_json(MIXTRAL)
    assert (found.train, found.checkpoint, found.balance) == (
        Config().train,
        Config().checkpoint,
        Config().balance,
    )
    assert found.data.seq_len == 64  # no longer than the model takes

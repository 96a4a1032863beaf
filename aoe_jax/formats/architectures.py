"""The architectures that can be read, as tables: what their configurations and their tensors are
called.
"""

from dataclasses import dataclass, field
from typing import Any

from aoe_jax.formats.layout import PARAMETERS, ROUTING_STATE, Tensor


@dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    class_name: str  # in `architectures` of config.json
    tensors: dict[
        str, tuple[Tensor, ...]
    ]  # by parameter, the layouts it may have; the first is the one that is written
    fields: dict[str, str] = field(
        default_factory=dict
    )  # a name in config.json: the field of `Config` that it sets
    choices: dict[str, dict] = field(
        default_factory=dict
    )  # where config.json has other words: what they mean
    constants: dict[str, Any] = field(
        default_factory=dict
    )  # fields of `Config` that are the same for all its models
    defaults: dict[str, Any] = field(default_factory=dict)  # what config.json may leave out
    only: dict[str, tuple] = field(
        default_factory=dict
    )  # what config.json may say of that which is fixed here
    rope_types: tuple[str, ...] = ("default",)
    ignored: tuple[str, ...] = ()  # tensors that old files have and nothing needs


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."

# What all have alike.
_DECODER = {
    "embed/embedding": (Tensor("model.embed_tokens.weight"),),
    "output/embedding": (Tensor("lm_head.weight"),),
    "final_norm/scale": (Tensor("model.norm.weight"),),
    "layers/attention_norm/scale": (Tensor(_LAYER + "input_layernorm.weight"),),
    "layers/attention/q": (Tensor(_ATTENTION + "q_proj.weight", "(H h) d"),),
    "layers/attention/k": (Tensor(_ATTENTION + "k_proj.weight", "(K h) d"),),
    "layers/attention/v": (Tensor(_ATTENTION + "v_proj.weight", "(K h) d"),),
    "layers/attention/o": (Tensor(_ATTENTION + "o_proj.weight", "d (H h)"),),
    "layers/experts_norm/scale": (Tensor(_LAYER + "post_attention_layernorm.weight"),),
}
_NORM_BIASES = {
    "final_norm/bias": (Tensor("model.norm.bias"),),
    "layers/attention_norm/bias": (Tensor(_LAYER + "input_layernorm.bias"),),
    "layers/experts_norm/bias": (Tensor(_LAYER + "post_attention_layernorm.bias"),),
}
_ATTENTION_BIASES = {
    "layers/attention/q_bias": (Tensor(_ATTENTION + "q_proj.bias", "(H h)"),),
    "layers/attention/k_bias": (Tensor(_ATTENTION + "k_proj.bias", "(K h)"),),
    "layers/attention/v_bias": (Tensor(_ATTENTION + "v_proj.bias", "(K h)"),),
    "layers/attention/o_bias": (Tensor(_ATTENTION + "o_proj.bias"),),
}
_QK_NORMS = {
    "layers/attention/q_norm": (Tensor(_ATTENTION + "q_norm.weight", "(H h)"),),
    "layers/attention/k_norm": (Tensor(_ATTENTION + "k_norm.weight", "(K h)"),),
}
_OUTPUT_BIAS = {"output_bias": (Tensor("lm_head.bias"),)}


def _experts(block, gate, up, down, router="gate"):
    """A tensor an expert, as on the hub, in a block of this name; or all in one, as transformers
    writes them since 5.0.
    """
    each, all_of = _LAYER + block + ".experts.{expert}.", _LAYER + "mlp.experts."
    routers = dict.fromkeys((_LAYER + f"{block}.gate.weight", _LAYER + f"mlp.{router}.weight"))
    return {
        "layers/experts/w_router": tuple(Tensor(name, "n d") for name in routers),
        "layers/experts/w_g": (
            Tensor(each + f"{gate}.weight", "f d"),
            Tensor(all_of + "gate_up_proj", "n f d", half=0),
        ),
        "layers/experts/w_p": (
            Tensor(each + f"{up}.weight", "f d"),
            Tensor(all_of + "gate_up_proj", "n f d", half=1),
        ),
        "layers/experts/w_o": (
            Tensor(each + f"{down}.weight", "d f"),
            Tensor(all_of + "down_proj", "n d f"),
        ),
    }


_FIELDS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.d_model",
    "num_hidden_layers": "model.n_layers",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "max_position_embeddings": "model.max_len",
    "rms_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tie_embeddings",
    "intermediate_size": "experts.d_ffn",
    "num_experts_per_tok": "experts.top_k",
}
_DEFAULTS = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
_ONLY = {"hidden_act": ("silu",), "quantization_config": (None,)}

ARCHITECTURES = {
    "mixtral": Architecture(
        class_name="MixtralForCausalLM",
        tensors=_DECODER | _experts("block_sparse_moe", "w1", "w3", "w2"),
        fields=_FIELDS | {"num_local_experts": "experts.n_experts"},
        constants={"experts.kind": "router"},
        defaults=_DEFAULTS | {"rope_theta": 1e6},
        only=_ONLY,
        ignored=(_ATTENTION + "rotary_emb.inv_freq",),
    ),
    "olmoe": Architecture(
        class_name="OlmoeForCausalLM",
        tensors=_DECODER
        | _ATTENTION_BIASES
        | _QK_NORMS
        | _experts("mlp", "gate_proj", "up_proj", "down_proj"),
        fields=_FIELDS
        | {
            "num_experts": "experts.n_experts",
            "norm_topk_prob": "experts.gate",
            "attention_bias": "model.attention_bias",
        },
        choices={"norm_topk_prob": {False: "all", True: "chosen"}},
        constants={"experts.kind": "router", "model.qk_norm": True},
        defaults=_DEFAULTS
        | {
            "rope_theta": 1e4,
            "num_key_value_heads": None,
            "norm_topk_prob": False,
            "attention_bias": False,
        },
        only=_ONLY | {"clip_qkv": (None,)},
    ),
    "phimoe": Architecture(
        class_name="PhimoeForCausalLM",
        tensors=_DECODER
        | _NORM_BIASES
        | _ATTENTION_BIASES
        | _OUTPUT_BIAS
        | _experts("block_sparse_moe", "w1", "w3", "w2", router="router"),
        fields=_FIELDS
        | {
            "num_local_experts": "experts.n_experts",
            "router_jitter_noise": "experts.router_jitter",
            "attention_bias": "model.attention_bias",
            "lm_head_bias": "model.output_bias",
        },
        constants={"experts.kind": "router", "experts.gate": "sparsemixer", "model.norm": "layer"},
        defaults=_DEFAULTS
        | {
            "rope_theta": 1e6,
            "router_jitter_noise": 0.01,
            "attention_bias": False,
            "lm_head_bias": False,
        },
        only=_ONLY | {"num_experts_per_tok": (2,)},
        rope_types=("default", "longrope"),
    ),
    # Its configuration has our own fields, see aoe_jax/formats/__init__.py; experts lie as here,
    # inputs before outputs.
    "aoe": Architecture(
        class_name="AoEForCausalLM",
        tensors={
            path: (
                Tensor(
                    f"{_LAYER}mlp.{'experts.' * axes.startswith('n ')}{path.rpartition('/')[2]}"
                ),
            )
            for path, axes in (PARAMETERS | ROUTING_STATE).items()
            if path.startswith("layers/experts/") or path in ROUTING_STATE
        }
        | _DECODER
        | _NORM_BIASES
        | _ATTENTION_BIASES
        | _QK_NORMS
        | _OUTPUT_BIAS,
    ),
}

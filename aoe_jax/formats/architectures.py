"""The architectures that can be read, as tables: their tensors and the fields of `config.json`.

**Tensors.** A row has the path of a parameter of the decoder, the name of the tensor, and the
tensor's axes where they differ from the parameter's (`aoe_jax/parameters.py`). Parameters under
`layers/` have a tensor for each layer, with `model.layers.N.` before the name. Axes are letters:

    V vocabulary      H query heads             f width of an expert
    d model width     G key and value heads     h width of a head
    n experts

`Hh d` flattens H and h into one axis, H outermost. `f/0` and `f/1` are the first and the second
half of an axis that holds two parameters. With `{n}` in its name, each expert has a tensor.
Where a parameter has several rows, a file may have any of them; the first is the one we write.

**The format `aoe`** stores what no architecture of the Hugging Face hub can express. Its
`config.json` has `model_type: "aoe"` and the groups `model`, `experts` and `routing`: the fields of
`Config` that decide what the model computes. Tensors have the names and axes that
`aoe_jax.parameters` and the methods give them, and so has the state of routing, which is float32 in
every model. A dense layer has the tensors of experts without the axis n.
"""

from dataclasses import dataclass, field
from typing import Any

from aoe_jax.formats.layout import Layout, Row
from aoe_jax.methods import declared_parameters

OWN = "aoe"  # the model_type of our own format
_LAYER = "model.layers.{L}."


def _table(text):
    """The rows of a table by the path of the parameter; several rows of a path are alternatives."""
    rows = {}
    for line in text.strip().splitlines():
        path, name, *stored = line.split()
        prefix = _LAYER if path.startswith("layers/") else ""
        rows[path] = (*rows.get(path, ()), Row(prefix + name, tuple(stored)))
    return rows


_DECODER = _table("""
    embed/embedding                  model.embed_tokens.weight
    output/embedding                 lm_head.weight
    output_bias                      lm_head.bias
    final_norm/scale                 model.norm.weight
    final_norm/bias                  model.norm.bias
    layers/attention_norm/scale      input_layernorm.weight
    layers/attention_norm/bias       input_layernorm.bias
    layers/attention/q               self_attn.q_proj.weight                   Hh d
    layers/attention/k               self_attn.k_proj.weight                   Gh d
    layers/attention/v               self_attn.v_proj.weight                   Gh d
    layers/attention/o               self_attn.o_proj.weight                   d Hh
    layers/attention/q_bias          self_attn.q_proj.bias                     Hh
    layers/attention/k_bias          self_attn.k_proj.bias                     Gh
    layers/attention/v_bias          self_attn.v_proj.bias                     Gh
    layers/attention/o_bias          self_attn.o_proj.bias
    layers/attention/q_norm          self_attn.q_norm.weight                   Hh
    layers/attention/k_norm          self_attn.k_norm.weight                   Gh
    layers/experts_norm/scale        post_attention_layernorm.weight
    layers/experts_norm/bias         post_attention_layernorm.bias
""")
_MIXTRAL_EXPERTS = _table("""
    layers/experts/w_router          block_sparse_moe.gate.weight              n d
    layers/experts/w_router          mlp.gate.weight                           n d
    layers/experts/w_router          mlp.router.weight                         n d
    layers/experts/w_gate            block_sparse_moe.experts.{n}.w1.weight    f d
    layers/experts/w_up              block_sparse_moe.experts.{n}.w3.weight    f d
    layers/experts/w_down            block_sparse_moe.experts.{n}.w2.weight    d f
    layers/experts/w_gate            mlp.experts.gate_up_proj                  n f/0 d
    layers/experts/w_up              mlp.experts.gate_up_proj                  n f/1 d
    layers/experts/w_down            mlp.experts.down_proj                     n d f
""")
_OLMOE_EXPERTS = _table("""
    layers/experts/w_router          mlp.gate.weight                           n d
    layers/experts/w_gate            mlp.experts.{n}.gate_proj.weight          f d
    layers/experts/w_up              mlp.experts.{n}.up_proj.weight            f d
    layers/experts/w_down            mlp.experts.{n}.down_proj.weight          d f
    layers/experts/w_gate            mlp.experts.gate_up_proj                  n f/0 d
    layers/experts/w_up              mlp.experts.gate_up_proj                  n f/1 d
    layers/experts/w_down            mlp.experts.down_proj                     n d f
""")


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: its tensors, and the fields of `Config` that its `config.json` sets."""

    tensors: dict[str, tuple[Row, ...]]  # by the path of the parameter
    required: dict[str, str] = field(default_factory=dict)  # field of config.json: that of `Config`
    optional: dict[str, tuple[str, Any]] = field(default_factory=dict)  # ... and its default
    only: dict[str, Any] = field(default_factory=dict)  # the one value that is implemented
    constants: dict[str, Any] = field(default_factory=dict)  # fields of `Config` common to all
    rope_theta: float = 1e6  # where config.json has none
    rope_types: tuple[str, ...] = ("default",)


_REQUIRED = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.d_model",
    "num_hidden_layers": "model.n_layers",
    "num_attention_heads": "model.n_heads",
    "max_position_embeddings": "model.max_len",
    "intermediate_size": "experts.d_ffn",
    "num_experts_per_tok": "experts.top_k",
}
_MIXTRAL_REQUIRED = _REQUIRED | {
    "num_key_value_heads": "model.n_kv_heads",
    "num_local_experts": "experts.n_experts",
}
_OPTIONAL = {
    "rms_norm_eps": ("model.norm_eps", 1e-5),
    "tie_word_embeddings": ("model.tie_embeddings", False),
}
_ONLY = {"hidden_act": "silu", "quantization_config": None}

ARCHITECTURES = {
    "mixtral": Architecture(
        tensors=_DECODER | _MIXTRAL_EXPERTS,
        required=_MIXTRAL_REQUIRED,
        optional=_OPTIONAL,
        only=_ONLY,
    ),
    "olmoe": Architecture(
        tensors=_DECODER | _OLMOE_EXPERTS,
        required=_REQUIRED | {"num_experts": "experts.n_experts"},
        optional=_OPTIONAL
        | {
            "attention_bias": ("model.attention_bias", False),
            "num_key_value_heads": ("model.n_kv_heads", None),
            "norm_topk_prob": ("routing.norm_topk_prob", False),
        },
        only=_ONLY | {"clip_qkv": None},
        constants={"model.qk_norm": True},
        rope_theta=1e4,
    ),
    "phimoe": Architecture(
        tensors=_DECODER | _MIXTRAL_EXPERTS,
        required=_MIXTRAL_REQUIRED,
        optional=_OPTIONAL
        | {
            "attention_bias": ("model.attention_bias", False),
            "router_jitter_noise": ("routing.jitter", 0.01),
            "lm_head_bias": ("model.output_bias", False),
        },
        only=_ONLY | {"num_experts_per_tok": 2},
        constants={"routing.name": "sparsemixer", "model.norm": "layer"},
        rope_types=("default", "longrope"),
    ),
    OWN: Architecture(_DECODER),
}


def layouts(model_type: str, path: str, shape: tuple[int, ...]) -> list[Layout]:
    """How files may store a parameter or a routing state; the first is how we write it."""
    parameter = declared_parameters().get(path)
    axes = parameter.axes if parameter else "n"  # a state of routing has one axis at most
    rows = ARCHITECTURES[model_type].tensors.get(path, ())
    if model_type == OWN and not rows:
        group = "experts." if axes.startswith("n ") else ""
        rows = (Row(f"{_LAYER}mlp.{group}{path.rpartition('/')[2]}"),)
    return [Layout(row, axes, shape) for row in rows]

"""The architectures that can be read, as tables: their tensors and the fields of `config.json`.

**Tensors.** A row has the path of a parameter of the decoder, its axes, the name of the tensor, and
the tensor's axes where they differ. Parameters under `layers/` have the axis of layers before these
axes, and their tensors `model.layers.N.` before the name. Axes are letters:

    V vocabulary      H query heads             f width of an expert
    d model width     K key and value heads     h width of a head
    n experts

`(H h) d` flattens H and h into one axis, H outermost. `f/0` and `f/1` are the first and the second
half of an axis that holds two parameters. With `{expert}` in its name, each expert has a tensor.
Where a parameter has several rows, a file may have any of them; the first is the one we write.

**The format `aoe`** stores what no architecture of the Hugging Face hub can express. Its
`config.json` has `model_type: "aoe"` and the groups `model`, `experts` and `routing`: the fields of
`Config` that decide what the model computes. Tensors have the names that `aoe_jax.parameters` and
the methods give them, and so has the state of routing. A dense layer has the tensors of experts
without the axis n.
"""

from dataclasses import dataclass, field
from typing import Any

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.formats.layout import LAYER, Tensor, parse_table
from aoe_jax.methods import LAYERS, ROUTERS, declared_parameters

_DECODER = parse_table("""
    embed/embedding                  V d      model.embed_tokens.weight
    output/embedding                 V d      lm_head.weight
    output_bias                      V        lm_head.bias
    final_norm/scale                 d        model.norm.weight
    final_norm/bias                  d        model.norm.bias
    layers/attention_norm/scale      d        input_layernorm.weight
    layers/attention_norm/bias       d        input_layernorm.bias
    layers/attention/q               d H h    self_attn.q_proj.weight           (H h) d
    layers/attention/k               d K h    self_attn.k_proj.weight           (K h) d
    layers/attention/v               d K h    self_attn.v_proj.weight           (K h) d
    layers/attention/o               H h d    self_attn.o_proj.weight           d (H h)
    layers/attention/q_bias          H h      self_attn.q_proj.bias             (H h)
    layers/attention/k_bias          K h      self_attn.k_proj.bias             (K h)
    layers/attention/v_bias          K h      self_attn.v_proj.bias             (K h)
    layers/attention/o_bias          d        self_attn.o_proj.bias
    layers/attention/q_norm          H h      self_attn.q_norm.weight           (H h)
    layers/attention/k_norm          K h      self_attn.k_norm.weight           (K h)
    layers/experts_norm/scale        d        post_attention_layernorm.weight
    layers/experts_norm/bias         d        post_attention_layernorm.bias
""")

_MIXTRAL_EXPERTS = parse_table("""
    layers/experts/w_router          d n      block_sparse_moe.gate.weight                   n d
    layers/experts/w_router          d n      mlp.gate.weight                                n d
    layers/experts/w_router          d n      mlp.router.weight                              n d
    layers/experts/w_gate            n d f    block_sparse_moe.experts.{expert}.w1.weight    f d
    layers/experts/w_gate            n d f    mlp.experts.gate_up_proj                       n f/0 d
    layers/experts/w_up              n d f    block_sparse_moe.experts.{expert}.w3.weight    f d
    layers/experts/w_up              n d f    mlp.experts.gate_up_proj                       n f/1 d
    layers/experts/w_down            n f d    block_sparse_moe.experts.{expert}.w2.weight    d f
    layers/experts/w_down            n f d    mlp.experts.down_proj                          n d f
""")

_OLMOE_EXPERTS = parse_table("""
    layers/experts/w_router          d n      mlp.gate.weight                                n d
    layers/experts/w_gate            n d f    mlp.experts.{expert}.gate_proj.weight          f d
    layers/experts/w_gate            n d f    mlp.experts.gate_up_proj                       n f/0 d
    layers/experts/w_up              n d f    mlp.experts.{expert}.up_proj.weight            f d
    layers/experts/w_up              n d f    mlp.experts.gate_up_proj                       n f/1 d
    layers/experts/w_down            n f d    mlp.experts.{expert}.down_proj.weight          d f
    layers/experts/w_down            n f d    mlp.experts.down_proj                          n d f
""")


def _own_experts():
    """The tensors of our own format: each parameter under its own name."""
    tensors = {}
    for path, parameter in declared_parameters().items():
        name = path.removeprefix("layers/experts/")
        if name != path:
            # An axis that is a number, such as UoE's neurons, is "s" here.
            axes = tuple("s" if a.isdigit() else a for a in parameter.axes.split())
            group = "experts." if axes[0] == "n" and len(axes) > 1 else ""
            tensors[path] = (Tensor(f"{LAYER}mlp.{group}{name}", axes, None),)
    return tensors


def _routing_state():
    """The state of every method, which is float32 in every model."""
    experts, balance, d = ExpertsConfig(kind="router", n_experts=3), BalanceConfig(bias_rate=1.0), 5
    axes = {(): (), (3,): ("n",), (d,): ("d",)}
    return {
        f"layers/{name}": (Tensor(f"{LAYER}mlp.{name}", axes[a.shape], None),)
        for method in (ROUTERS | LAYERS).values()
        for name, a in method().state_shapes(experts, balance, d).items()
    }


ROUTING_STATE = _routing_state()
REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A field of `config.json`."""

    sets: str | None = None  # the field of `Config` that it sets
    default: Any = REQUIRED
    only: tuple = ()  # the values that are implemented; empty: any


@dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    class_name: str  # in `architectures` of config.json
    tensors: dict[str, tuple[Tensor, ...]]  # by the path of the parameter
    fields: dict[str, Field] = field(default_factory=dict)  # of config.json
    constants: dict[str, Any] = field(default_factory=dict)  # fields of `Config` common to all
    rope_theta: float = 1e4  # where config.json has none
    rope_types: tuple[str, ...] = ("default",)
    ignored: tuple[str, ...] = ()  # tensors that old files have and nothing needs


_FIELDS = {
    "vocab_size": Field("model.vocab_size"),
    "hidden_size": Field("model.d_model"),
    "num_hidden_layers": Field("model.n_layers"),
    "num_attention_heads": Field("model.n_heads"),
    "num_key_value_heads": Field("model.n_kv_heads"),
    "max_position_embeddings": Field("model.max_len"),
    "rms_norm_eps": Field("model.norm_eps", 1e-5),
    "tie_word_embeddings": Field("model.tie_embeddings", False),
    "intermediate_size": Field("experts.d_ffn"),
    "num_experts_per_tok": Field("experts.top_k"),
    "hidden_act": Field(default="silu", only=("silu",)),
    "quantization_config": Field(default=None, only=(None,)),
}

ARCHITECTURES = {
    "mixtral": Architecture(
        class_name="MixtralForCausalLM",
        tensors=_DECODER | _MIXTRAL_EXPERTS,
        fields=_FIELDS | {"num_local_experts": Field("experts.n_experts")},
        constants={"experts.kind": "router"},
        rope_theta=1e6,
        ignored=(LAYER + "self_attn.rotary_emb.inv_freq",),
    ),
    "olmoe": Architecture(
        class_name="OlmoeForCausalLM",
        tensors=_DECODER | _OLMOE_EXPERTS,
        fields=_FIELDS
        | {
            "num_experts": Field("experts.n_experts"),
            "num_key_value_heads": Field("model.n_kv_heads", None),
            "norm_topk_prob": Field("routing.norm_topk_prob", False),
            "attention_bias": Field("model.attention_bias", False),
            "clip_qkv": Field(default=None, only=(None,)),
        },
        constants={"experts.kind": "router", "model.qk_norm": True},
    ),
    "phimoe": Architecture(
        class_name="PhimoeForCausalLM",
        tensors=_DECODER | _MIXTRAL_EXPERTS,
        fields=_FIELDS
        | {
            "num_local_experts": Field("experts.n_experts"),
            "num_experts_per_tok": Field("experts.top_k", only=(2,)),
            "router_jitter_noise": Field("routing.jitter", 0.01),
            "attention_bias": Field("model.attention_bias", False),
            "lm_head_bias": Field("model.output_bias", False),
        },
        constants={
            "experts.kind": "router",
            "routing.name": "sparsemixer",
            "model.norm": "layer",
        },
        rope_theta=1e6,
        rope_types=("default", "longrope"),
    ),
    "aoe": Architecture("AoEForCausalLM", _DECODER | _own_experts() | ROUTING_STATE),
}

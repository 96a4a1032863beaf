"""Tables of each architecture: the tensors in its files, and the fields of its `config.json`.

**Tensors.** A row contains the path of a decoder parameter, the name of its tensor, and the axes of
the tensor if they differ from the parameter's. `aoe_jax/parameters.py` declares the parameter's
axes, and `aoe_jax/moe/__init__.py` explains the letters. A parameter under `layers/` has one tensor
per layer, with `model.layers.N.` before the name; the layers under `dense_layers/` are numbered
first. A name with `{n}` means one tensor per expert. `Hh d` flattens H and h into one axis, H
outermost. `f/0` and `f/1` are the first and the second half of an axis that contains two
parameters. If a parameter has several rows, we read files with any of them, and write the first.

**The format `aoe`** stores models that no architecture of the Hugging Face hub can express. If the
classes in `huggingface/` can compute the model, `config.json` has the fields of these classes, and
their source files are copied, too. Otherwise `config.json` has the groups `model`, `experts` and
`routing`, with the fields of `Config` that affect the results. `aoe_jax.parameters` declares names
and axes of tensors, and the methods declare the routing state, which is float32. A dense model has
the tensors of experts without the axis n. Dense layers before MoE layers have Llama's tensors.
"""

import ast
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from aoe_jax.errors import UserError
from aoe_jax.formats.tensor_files import Stored
from aoe_jax.model.declared import declared

OWN = "aoe"  # the model_type of our own format
_LAYER = "model.layers.{L}."


def _table(text):
    """Returns the rows of each path: `{path: [(name,) or (name, axes of the tensor)]}`."""
    rows = {}
    for line in text.strip().splitlines():
        path, name, *stored = line.split(maxsplit=2)
        prefix = _LAYER if path.startswith("layers/") else ""
        rows.setdefault(path, []).append((prefix + name, *stored))
    return rows


_DECODER = _table("""
    embed/embedding                  model.embed_tokens.weight
    output/embedding                 lm_head.weight
    final_norm/scale                 model.norm.weight
    layers/attention_norm/scale      input_layernorm.weight
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
    layers/attention/q_head_norm     self_attn.q_norm.weight
    layers/attention/k_head_norm     self_attn.k_norm.weight
    layers/experts_norm/scale        post_attention_layernorm.weight
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
_QWEN2_MOE_EXPERTS = _OLMOE_EXPERTS | _table("""
    layers/experts/w_shared_gate     mlp.shared_expert.gate_proj.weight        u d
    layers/experts/w_shared_up       mlp.shared_expert.up_proj.weight          u d
    layers/experts/w_shared_down     mlp.shared_expert.down_proj.weight        d u
    layers/experts/w_shared_scale    mlp.shared_expert_gate.weight             1 d
""")
_DEEPSEEK_EXPERTS = _OLMOE_EXPERTS | _table("""
    layers/selection_bias            mlp.gate.e_score_correction_bias
    layers/experts/w_shared_gate     mlp.shared_experts.gate_proj.weight       u d
    layers/experts/w_shared_up       mlp.shared_experts.up_proj.weight         u d
    layers/experts/w_shared_down     mlp.shared_experts.down_proj.weight       d u
""")
_DENSE_LAYER = _table("""
    layers/experts/w_gate            mlp.gate_proj.weight                      f d
    layers/experts/w_up              mlp.up_proj.weight                        f d
    layers/experts/w_down            mlp.down_proj.weight                      d f
""")
_DENSE_IN_FRONT = {  # dense layers in front of layers with experts
    f"dense_{path}": rows
    for path, rows in (_DECODER | _DENSE_LAYER).items()
    if path.startswith("layers/")
}


def _fields(text):
    """`{field of config.json: (field of Config, default)}`; a field without default is required."""
    rows = (line.split() for line in text.strip().splitlines())
    return {name: (sets, *map(ast.literal_eval, default)) for name, sets, *default in rows}


_FIELDS = _fields("""
    vocab_size                         model.vocab_size
    hidden_size                        model.d_model
    num_hidden_layers                  model.n_layers
    num_attention_heads                model.n_heads
    num_key_value_heads                model.n_kv_heads
    head_dim                           model.head_dim                None
    max_position_embeddings            model.max_len
    rms_norm_eps                       model.norm_eps                1e-5
    tie_word_embeddings                model.tie_embeddings          False
""")
_MOE = _FIELDS | _fields("""
    num_experts_per_tok                experts.top_k
    intermediate_size                  experts.d_ffn
""")
_QWEN_MOE = _FIELDS | _fields("""
    num_experts_per_tok                experts.top_k
    num_experts                        experts.n_experts
    moe_intermediate_size              experts.d_ffn
    norm_topk_prob                     routing.norm_topk_prob        False
    rms_norm_eps                       model.norm_eps                1e-6
""")
_DENSE = _FIELDS | _fields("""
    intermediate_size                  experts.d_ffn
    attention_bias                     model.attention_bias          False
    rms_norm_eps                       model.norm_eps                1e-6
""")
_ONLY = {"hidden_act": ("silu",), "quantization_config": (None,)}
_QWEN_ONLY = _ONLY | {"use_sliding_window": (False,)}  # False disables `sliding_window`
_QWEN_MOE_ONLY = _QWEN_ONLY | {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}
_ROUTER = {"experts.kind": "router"}
_IS_DENSE = {"experts.kind": "dense", "routing.name": "dense"}


class Architecture(NamedTuple):
    """One `model_type`: its tensors, and the fields of `Config` that its `config.json` sets."""

    class_name: str  # the name of the class in transformers
    tensors: dict[str, list]  # result of `_table`
    fields: dict[str, tuple]  # result of `_fields`
    only: dict[str, tuple] = _ONLY  # field of config.json -> implemented values, the default first
    constants: dict[str, Any] = _ROUTER  # field of `Config` -> its value in all models
    rope_theta: float = 1e4  # the default of this field of config.json
    rope_types: tuple[str, ...] = ("default", "longrope")
    rope_share: float = 1.0  # the default of partial_rotary_factor in config.json
    aliases: tuple[tuple[str, str], ...] = ()  # (other name of a field, its name in `fields`)


_DEEPSEEK = Architecture(  # DeepSeek-V3 with standard attention
    "",
    tensors=_DECODER | _DENSE_IN_FRONT | _DEEPSEEK_EXPERTS,
    fields=_MOE
    | _fields("""
    intermediate_size                  model.d_dense
    first_k_dense_replace              model.n_dense_layers
    moe_intermediate_size              experts.d_ffn
    n_routed_experts                   experts.n_experts
    n_shared_experts                   experts.d_shared
    n_group                            routing.n_groups              1
    topk_group                         routing.groups_per_token      1
    norm_topk_prob                     routing.norm_topk_prob        False
    routed_scaling_factor              routing.scale                 1.0
"""),
    only=_ONLY | {"moe_layer_freq": (1,)},
    constants=_ROUTER | {"routing.name": "sigmoid_top_k"},
    aliases=(("num_local_experts", "n_routed_experts"),),
)

ARCHITECTURES = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        tensors=_DECODER | _MIXTRAL_EXPERTS,
        fields=_MOE | {"num_local_experts": ("experts.n_experts",)},
        rope_theta=1e6,
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        tensors=_DECODER | _OLMOE_EXPERTS,
        fields=_MOE
        | _fields("""
    num_experts                        experts.n_experts
    num_key_value_heads                model.n_kv_heads              None
    norm_topk_prob                     routing.norm_topk_prob        False
    attention_bias                     model.attention_bias          False
"""),
        only=_ONLY | {"clip_qkv": (None,)},
        constants=_ROUTER | {"model.qk_norm": "all"},
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        tensors=_DECODER | _QWEN2_MOE_EXPERTS,
        fields=_QWEN_MOE
        | _fields("""
    shared_expert_intermediate_size    experts.d_shared
    qkv_bias                           model.qkv_bias                True
"""),
        only=_QWEN_MOE_ONLY,
        constants=_ROUTER | {"experts.shared_gate": True},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        tensors=_DECODER | _OLMOE_EXPERTS,
        fields=_QWEN_MOE | {"attention_bias": ("model.attention_bias", False)},
        only=_QWEN_MOE_ONLY,
        constants=_ROUTER | {"model.qk_norm": "head"},
        aliases=(("num_local_experts", "num_experts"),),
    ),
    "dots1": _DEEPSEEK._replace(
        class_name="Dots1ForCausalLM",
        fields=_DEEPSEEK.fields
        | _fields("""
    attention_bias                     model.attention_bias          False
    rms_norm_eps                       model.norm_eps                1e-6
    num_key_value_heads                model.n_kv_heads              None
    first_k_dense_replace              model.n_dense_layers          0
"""),
        constants=_DEEPSEEK.constants | {"model.qk_norm": "head"},
    ),
    "glm4_moe": _DEEPSEEK._replace(
        class_name="Glm4MoeForCausalLM",
        fields=_DEEPSEEK.fields
        | _fields("""
    attention_bias                     model.qkv_bias                False
    use_qk_norm                        model.qk_norm                 False
    partial_rotary_factor              model.rope_share              0.5
    norm_topk_prob                     routing.norm_topk_prob        True
    first_k_dense_replace              model.n_dense_layers          1
    n_shared_experts                   experts.d_shared              1
"""),
        rope_share=0.5,
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        tensors=_DECODER | _DENSE_LAYER,
        fields=_DENSE | {"num_key_value_heads": ("model.n_kv_heads", None)},
        only=_ONLY | {"mlp_bias": (False,)},
        constants=_IS_DENSE,
        rope_types=("default", "llama3", "longrope"),
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        tensors=_DECODER | _DENSE_LAYER,
        fields=_DENSE | {"head_dim": ("model.head_dim", 128)},
        only=_QWEN_ONLY,
        constants=_IS_DENSE | {"model.qk_norm": "head"},
    ),
    OWN: Architecture(  # the fields of `AoEConfig` in huggingface/
        "AoEForCausalLM",
        tensors=_DECODER | _DENSE_IN_FRONT,
        fields=_MOE
        | _fields("""
    num_local_experts                  experts.n_experts
    score_neurons                      experts.score_neurons
    gate_rank                          experts.d_low
    score                              experts.score
    norm_topk_prob                     routing.norm_topk_prob        False
    qk_norm                            model.qk_norm
    attention_bias                     model.attention_bias          False
    qkv_bias                           model.qkv_bias                False
    shared_expert_intermediate_size    experts.d_shared              0
    shared_expert_gate                 experts.shared_gate           False
    first_k_dense_replace              model.n_dense_layers          0
    dense_intermediate_size            model.d_dense                 None
    partial_rotary_factor              model.rope_share              1.0
"""),
        only=_ONLY | {"score": ("norm", "max")},
        constants={"experts.kind": "aoe"},
        rope_theta=1e6,
    ),
}


class Layout:
    """Converts between a parameter of known shape and the tensors of one row of a table.

    `whole` maps every axis of the parameter (L: layers) to `(0, size)`, `shape` is the shape of one
    tensor, and `first` is the name of the first tensor.
    """

    def __init__(
        self, axes: str, shape: tuple[int, ...], name: str, stored: str = "", first_layer: int = 0
    ):
        """`axes` are the declared axes of the parameter, `shape` includes the axis of layers, and
        `name` and `stored` are columns of the row. `first_layer` is the number of layer 0 in files.
        """
        self._name, self._first_layer = name, first_layer
        axes, layers = axes.split(), ["L"] if "{L}" in name else []
        axes = layers + axes[len(layers) + len(axes) - len(shape) :]  # a dense layer has no axis n
        self.whole = {axis: (0, size) for axis, size in zip(axes, shape, strict=True)}
        self._named = [axis for axis in axes if f"{{{axis}}}" in name]
        self._axes = axes[len(self._named) :]
        # Per axis of a tensor: (parameter axes, index of this parameter on it, parameters on it).
        self._groups = [([axis], 0, 1) for axis in self._axes]
        if stored:
            parts = [group.partition("/") for group in stored.split()]
            self._groups = [(list(names), int(n or 0), 2 if n else 1) for names, _, n in parts]
        self._order = [axis for group, _, _ in self._groups for axis in group]
        self.shape = tuple(self._size(group) * count for group, _, count in self._groups)
        self.first = name.format(L=first_layer, n=0)

    def _size(self, axes):
        return math.prod(self.whole[axis][1] for axis in axes)

    def tensors(self, bounds: dict[str, tuple[int, int]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields `(name, index)` of each tensor with elements in `bounds`, `{axis: (first, end)}`.
        If `part` is the parameter within `bounds`, `part[index]` are the tensor's elements.
        """
        layers, experts = (range(*bounds[a]) if a in self._named else (0,) for a in ("L", "n"))
        for layer in layers:
            for expert in experts:
                at = {"L": layer, "n": expert}
                index = tuple(at[axis] - bounds[axis][0] for axis in self._named)
                yield self._name.format(L=layer + self._first_layer, n=expert), index

    def read(self, tensor: Stored, bounds: dict[str, tuple[int, int]]) -> np.ndarray:
        """Returns the elements of a tensor within `bounds`, with the axes of the parameter."""
        slices = []
        for (outer, *inner), piece, _ in self._groups:
            offset, unit = piece * self._size([outer]), self._size(inner)
            slices.append(slice(*(unit * (offset + bound) for bound in bounds[outer])))
        sizes = [bounds[axis][1] - bounds[axis][0] for axis in self._order]
        part = tensor.read(slices).reshape(sizes)
        return part.transpose([self._order.index(axis) for axis in self._axes])

    def to_file(self, part: np.ndarray):
        """Returns a whole tensor with the axes of the file; `part` has the parameter's axes."""
        return part.transpose([self._axes.index(axis) for axis in self._order]).reshape(self.shape)


def find_layouts(model_type: str, shapes: dict[str, Any], names=()) -> dict[str, Layout]:
    """Returns `{path: Layout}` of parameters and routing states, for files with tensors `names`.

    `shapes` maps every path to an array or a `ShapeDtypeStruct`, with the axis of layers. If no
    tensor of a parameter is in `names`, its layout is the one that we write. Raises `UserError` if
    the architecture lacks a parameter of `shapes`.
    """
    n_dense = next((a.shape[0] for path, a in shapes.items() if path.startswith("dense_")), 0)
    found = {}
    for path, a in shapes.items():
        parameter = declared(path)
        axes = parameter.axes if parameter else "n"  # undeclared: a routing state
        rows = ARCHITECTURES[model_type].tensors.get(path)
        if model_type == OWN and not rows:
            group = "experts." if axes.startswith("n ") else ""
            rows = [(f"{_LAYER}mlp.{group}{path.rpartition('/')[2]}",)]
        if not rows:
            raise UserError(f"a model of model_type {model_type!r} has no parameter {path}")
        first_layer = n_dense if path.startswith("layers/") else 0
        known = [Layout(axes, a.shape, *row, first_layer=first_layer) for row in rows]
        found[path] = next((one for one in known if one.first in names), known[0])
    return found

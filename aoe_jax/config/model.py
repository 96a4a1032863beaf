"""The group `model`: the decoder."""

import math
from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting


@dataclass(frozen=True)
class ModelConfig(Group):
    """The decoder."""

    group = "model"

    n_layers: int = setting(4, above=0)  # number of layers in addition to n_dense_layers
    n_heads: int = setting(4, above=0)  # attention heads
    d_model: int = setting(128, above=0, at_most=2**20)  # width of the residual stream (d)
    # A trained tokenizer has as many tokens. None: that of a given tokenizer or store, else 4096.
    vocab_size: int | None = setting(None, above=0)
    max_len: int = setting(2048, above=0)  # tokens of the longest sequence, prompt included
    tie_embeddings: bool = True  # whether the output projection is the embedding table
    # dtype of the computation; parameters, logits and loss are float32. On accelerators bfloat16 is
    # usual; the fastest kernels need it.
    dtype: str = setting("float32", choices=("float32", "bfloat16"))
    # What the backward pass recomputes. experts: everything inside the experts except x W_up and
    # x W_gate (AoE: except x W_up and the low-rank activation). layer: everything except the input
    # of each layer, the output of its attention, its scores and its routing. full: that output too.
    remat: str = setting("none", choices=("none", "experts", "layer", "full"))
    # The backend of `model/attention/`; auto: chosen by platform, dtype and head width.
    attention: str = setting("auto", choices=("auto", "blocks", "splash", "cudnn"))
    # Number of layers in one step of the scan over layers. A scan copies arrays for the backward
    # pass, which is slow on CPU. Unrolled layers need longer compilation but fewer copies.
    unroll: int = setting(1, above=0)
    # The fields below are needed for checkpoints of other projects.

    # Width of a head; None: d_model / n_heads.
    head_dim: int | None = setting(None, above=0, at_most=2**20)
    # Number of heads of keys and values; None: n_heads.
    n_kv_heads: int | None = setting(None, above=0, divides="n_heads")
    rope_base: float = setting(10_000.0, above=0)  # base of the rotary frequencies
    rope_share: float = setting(1.0, above=0, at_most=1)  # fraction of a head's features to rotate
    rope_factors: tuple = ()  # one divisor per rotary frequency (Llama 3.1); (): none
    norm_eps: float = setting(1e-6, above=0)  # epsilon of the RMSNorms
    # RMSNorm of queries and of keys. all: over all heads together (OLMoE); head: over each head
    # separately, with the same scales for all heads (Qwen3).
    qk_norm: str = setting("none", choices=("none", "all", "head"))
    attention_bias: bool = False  # whether q, k, v and o have biases
    qkv_bias: bool = False  # whether q, k and v have biases, but not o
    # Number of layers with a dense SwiGLU of width d_dense before the expert layers (DeepSeek-V3).
    n_dense_layers: int = setting(0, at_least=0)
    d_dense: int | None = setting(None, above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim is None and self.d_model % (2 * self.n_heads):
            wanted = f"must divide d_model={self.d_model} into heads of even width"
            self.refuse("n_heads", f"{wanted} (features rotate in pairs); or set model.head_dim")
        if self.head_width % 2:
            self.refuse("head_dim", "must be even, because pairs of features rotate")
        if self.rope_width % 2 or not self.rope_width:
            wanted = f"must select an even number of the {self.head_width} features of a head"
            self.refuse("rope_share", wanted)
        frequencies = self.rope_width // 2
        are_factors = all(
            isinstance(factor, int | float) and 0 < factor < math.inf
            for factor in self.rope_factors
        )
        if len(self.rope_factors) not in (0, frequencies) or not are_factors:
            wanted = f"must be {frequencies} numbers greater than 0, one per rotary frequency"
            self.refuse("rope_factors", f"{wanted}, or ()")
        if self.qkv_bias and self.attention_bias:
            self.refuse("qkv_bias", "is part of model.attention_bias=True; set one of them")
        if (self.d_dense is None) != (self.n_dense_layers == 0):
            wanted = f"is the width of model.n_dense_layers={self.n_dense_layers} layers"
            self.refuse("d_dense", f"{wanted}; set both, or leave them at None and 0")
        if self.unroll > 1 and self.remat in ("layer", "full"):
            wanted = "unrolled layers would not be recomputed; set 1"
            self.refuse("unroll", f"with remat={self.remat!r}, {wanted}")

    def check(self, config):
        kind = config.experts.kind
        if self.n_dense_layers and kind not in ("aoe", "router"):
            wanted = "is for experts.kind='aoe' or 'router'; set it to 0"
            self.refuse("n_dense_layers", f"{wanted} with experts.kind={kind!r}")

    @property
    def head_width(self):
        """Width of an attention head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rope_width(self):
        """The number of features of an attention head that rotate."""
        return int(self.head_width * self.rope_share)

    @property
    def kv_heads(self):
        """The number of heads of keys and values."""
        return self.n_kv_heads or self.n_heads

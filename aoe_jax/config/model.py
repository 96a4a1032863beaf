"""The group `model`: the decoder."""

import math
from dataclasses import dataclass

from aoe_jax.config.checks import require, require_choice, require_positive


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. `vocab_size` is also the size of a vocabulary that is trained on the corpus."""

    n_layers: int = 4
    n_heads: int = 4  # of attention
    d_model: int = 128  # width of the residual stream (d)
    vocab_size: int = 4096
    max_len: int = (
        2048  # positions; data.seq_len can't be greater, nor a prompt and its continuation together
    )
    tie_embeddings: bool = True  # output by the embedding table
    dtype: str = "bfloat16"  # of the computation; parameters, logits and loss are float32
    # What the backward pass recomputes. none; experts: all that is cheap to recompute inside the
    # experts (of an AoE expert C and x Wp are kept, of a traditional one x Wg and x Wp); layer: all
    # but a layer's input, its scores and selection.
    remat: str = "none"
    # Layers in a step of the scan over them. A scan copies all that the backward pass needs, which
    # CPUs are slow at: there more layers at once are faster. They take longer to compile.
    unroll: int = 1
    # What checkpoints of other projects have; a model that is trained here from the start needs
    # none of it.
    n_kv_heads: int | None = (
        None  # heads of keys and values, each shared by several of queries; None: n_heads
    )
    rope_base: float = 10_000.0  # of the rotary frequencies
    rope_factors: tuple = ()  # that divide the rotary frequencies, one each; (): none (LongRoPE, arXiv 2402.13753)
    rope_scale: float = 1.0  # of rotated queries and keys (LongRoPE)
    norm: str = "rms"  # rms | layer: LayerNorm with a bias
    norm_eps: float = 1e-6  # added to what a norm takes the root of
    qk_norm: bool = False  # an RMSNorm on queries and one on keys, each over all heads (OLMoE)
    attention_bias: bool = False  # of q, k, v and o
    output_bias: bool = False  # of the output projection

    def __post_init__(self):
        require_positive(
            "model", self, "n_layers", "n_heads", "d_model", "vocab_size", "max_len", "unroll"
        )
        require_positive("model", self, "rope_base", "rope_scale", "norm_eps")
        require(
            self.n_kv_heads is None
            or (self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads == 0),
            "model.n_kv_heads",
            self.n_kv_heads,
            f"must divide model.n_heads={self.n_heads}",
        )
        require(
            self.d_model % (2 * self.n_heads) == 0,
            "model.n_heads",
            self.n_heads,
            f"must divide d_model={self.d_model} into heads of even width (rotary positions turn pairs)",
        )
        frequencies = self.d_model // self.n_heads // 2
        require(
            len(self.rope_factors) in (0, frequencies)
            and all(
                isinstance(factor, int | float) and 0 < factor < math.inf
                for factor in self.rope_factors
            ),
            "model.rope_factors",
            self.rope_factors,
            f"must be {frequencies} numbers greater than 0, one a rotary frequency, or ()",
        )
        require_choice("model.norm", self.norm, ("rms", "layer"))
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        require_choice("model.remat", self.remat, ("none", "experts", "layer"))
        require(
            self.unroll == 1 or self.remat != "layer",
            "model.unroll",
            self.unroll,
            "with remat='layer' would let the compiler merge what is computed again with what was before; set 1",
        )

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        require(
            self.remat != "experts" or config.experts.kind != "dense",
            "model.remat",
            self.remat,
            "belongs to layers of experts; use none or layer with a dense model",
        )

    @property
    def kv_heads(self):
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

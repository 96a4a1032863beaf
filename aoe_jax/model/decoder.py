"""Llama-style decoder: pre-RMSNorm, rotary causal attention, experts in every layer, scanned over layers.

B sequences, S positions, L layers, d model width, V vocabulary, n experts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.config import BalanceConfig, Config, ExpertsConfig, ModelConfig
from aoe_jax.experts.layer import LAYERS
from aoe_jax.experts.parallel import embed
from aoe_jax.experts.selection import SELECTION
from aoe_jax.model.attention import Attention

# Computed again in the backward pass, which would else keep several float32 copies of its input.
RMSNorm = nn.remat(nn.RMSNorm, prevent_cse=False)


class DecoderLayer(nn.Module):
    """Attention and experts, each behind an RMSNorm and added to the residual stream."""

    model: ModelConfig
    experts: ExpertsConfig
    balance: BalanceConfig
    transport: str

    @nn.compact
    def __call__(self, x, segment_ids, token_weights, selection_bias):
        """`x [B, S, d]` -> `([B, S, d], LayerStats)`: the shape that `nn.scan` wants."""
        dtype = jnp.dtype(self.model.dtype)
        with jax.named_scope("attention"):
            normed = RMSNorm(dtype=dtype, name="attention_norm")(x)
            x = x + Attention(self.model.n_heads, dtype, name="attention")(normed, segment_ids)
        normed = RMSNorm(dtype=dtype, name="experts_norm")(x)
        recompute = self.model.remat == "experts"
        experts = LAYERS[self.experts.kind](
            self.experts, dtype, self.balance, recompute, self.transport, name="experts"
        )
        y, stats = experts(normed, token_weights, selection_bias)
        return x + y, stats


class Decoder(nn.Module):
    """The language model."""

    model: ModelConfig
    experts: ExpertsConfig
    balance: BalanceConfig = BalanceConfig()
    transport: str = "ring"

    @classmethod
    def from_config(cls, config: Config):
        """The decoder of a whole configuration."""
        return cls(config.model, config.experts, config.balance, config.mesh.transport)

    def setup(self):
        """Makes the modules; parameters are stacked over layers, `[L, ...]`."""
        c = self.model
        init = nn.initializers.normal(c.d_model**-0.5)
        self.embed = nn.Embed(c.vocab_size, c.d_model, dtype=jnp.dtype(c.dtype), embedding_init=init)
        if not c.tie_embeddings:
            self.output = nn.Embed(c.vocab_size, c.d_model, dtype=jnp.dtype(c.dtype), embedding_init=init)
        layer = DecoderLayer
        if c.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names(SELECTION)
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.n_layers,
            unroll=c.unroll,
        )(c, self.experts, self.balance, self.transport)
        self.final_norm = nn.RMSNorm(dtype=jnp.dtype(c.dtype))

    def features(self, tokens, segment_ids=None, token_weights=None, selection_bias=None):
        """Everything but the output projection.

        Args:
          tokens: `[B, S]` int32.
          segment_ids: `[B, S]` int32 document numbers to attend within, or None.
          token_weights: `[B, S]`, 0 for padding, which then counts in no statistic; None: all count.
          selection_bias: `[L, n]` float32 of loss-free balancing, or None.

        Returns:
          `(hidden, stats)`: `[B, S, d]` in the dtype of computation, and `LayerStats` stacked over layers.
        """
        with jax.named_scope("embed"):
            x = embed(self.embed.embedding, tokens, jnp.dtype(self.model.dtype))
        x, stats = self.layers(x, segment_ids, token_weights, selection_bias)
        return self.final_norm(x), stats

    def __call__(self, tokens, segment_ids=None, token_weights=None, selection_bias=None):
        """Logits `[B, S, V]` float32, and `LayerStats` stacked over layers; arguments as in `features`."""
        hidden, stats = self.features(tokens, segment_ids, token_weights, selection_bias)
        table = (self.embed if self.model.tie_embeddings else self.output).embedding
        return jnp.einsum("bsd,vd->bsv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32), stats


def output_table(params):
    """The output projection `[V, d]` float32 among the parameters: the embedding table where it is shared."""
    return params.get("output", params["embed"])["embedding"]

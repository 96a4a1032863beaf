"""Llama-style decoder: pre-RMSNorm, rotary causal attention, experts in every layer, scanned over
layers.

B sequences, S positions, L layers, d model width, V vocabulary, n experts.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.config import BalanceConfig, Config, ExpertsConfig, ModelConfig
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.parallel import embed
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.experts.selection.assignment import SELECTION
from aoe_jax.model.attention import Attention

# Computed again in the backward pass, which would else keep several float32 copies of its input.
RMSNorm = nn.remat(nn.RMSNorm, prevent_cse=False)
LayerNorm = nn.remat(nn.LayerNorm, prevent_cse=False)


def make_norm(c: ModelConfig):
    """The norm before attention, experts and output projection, as a module."""
    settings = {"epsilon": c.norm_eps, "dtype": jnp.dtype(c.dtype)}
    return (
        RMSNorm(**settings) if c.norm == "rms" else LayerNorm(use_fast_variance=False, **settings)
    )


class DecoderLayer(nn.Module):
    """Attention and experts, each behind a norm and added to the residual stream."""

    model: ModelConfig
    experts: ExpertsConfig
    balance: BalanceConfig
    transport: str
    method_settings: Any
    training: bool

    def setup(self):
        """Makes the modules."""
        self.attention_norm, self.experts_norm = make_norm(self.model), make_norm(self.model)
        kind = LAYERS[self.experts.kind]
        watched = kind.selects and SELECTIONS[self.experts.selection].needs_attention
        self.attention = Attention(self.model, watched)
        self.experts_layer = self.make_experts(kind, name="experts")

    def make_experts(self, kind, **settings):
        """A layer of experts of a class of `experts.layer`, with the settings of this one."""
        recompute = self.model.remat == "experts"
        dtype = jnp.dtype(self.model.dtype)
        of_method = {"settings": self.method_settings, "training": self.training}
        return kind(
            self.experts, dtype, self.balance, recompute, self.transport, **of_method, **settings
        )

    def __call__(self, x, segment_ids, token_weights, routing_state, number):
        """`x [B, S, d]` -> `([B, S, d], LayerStats)`: the shape that `nn.scan` wants; `number []`
        of the layer.
        """
        with jax.named_scope("attention"):
            y, concentration = self.attention(self.attention_norm(x), segment_ids)
            x = x + y
        return self._through_experts(x, token_weights, routing_state, concentration, number)

    def prefill(self, x, routing_state, number):
        """`x [B, S, d]` -> `([B, S, d], (keys, values))`, see `Attention.prefill`."""
        with jax.named_scope("attention"):
            y, concentration, cache = self.attention.prefill(self.attention_norm(x))
        return self._through_experts(x + y, None, routing_state, concentration, number)[0], cache

    def extend(self, x, cache, n_past, routing_state, number):
        """`x [B, S, d]` after what is in a cache -> `([B, S, d], cache)`, see `Attention.extend`."""
        with jax.named_scope("attention"):
            y, concentration, cache = self.attention.extend(self.attention_norm(x), cache, n_past)
        positions = n_past[:, None] + jnp.arange(x.shape[1])
        return self._through_experts(x + y, None, routing_state, concentration, number, positions)[
            0
        ], cache

    def _through_experts(
        self, x, token_weights, routing_state, concentration, number, positions=None
    ):
        of_tokens = self.experts_norm(x), token_weights
        y, stats = self.experts_layer(*of_tokens, routing_state, concentration, number, positions)
        return x + y, stats


class Decoder(nn.Module):
    """The language model."""

    Layer = DecoderLayer  # what it has `n_layers` of

    model: ModelConfig
    experts: ExpertsConfig
    balance: BalanceConfig = BalanceConfig()
    transport: str = "ring"
    settings: Any = None  # `Config.method_settings`
    training: bool = False  # whether layers behave as in training where that differs

    @classmethod
    def from_config(cls, config: Config, training=False):
        """The decoder of a whole configuration."""
        return cls(
            config.model,
            config.experts,
            config.balance,
            config.mesh.transport,
            config.method_settings,
            training,
        )

    def setup(self):
        """Makes the modules; parameters are stacked over layers, `[L, ...]`."""
        c = self.model
        init = nn.initializers.normal(c.d_model**-0.5)
        self.embed = nn.Embed(
            c.vocab_size, c.d_model, dtype=jnp.dtype(c.dtype), embedding_init=init
        )
        if not c.tie_embeddings:
            self.output = nn.Embed(
                c.vocab_size, c.d_model, dtype=jnp.dtype(c.dtype), embedding_init=init
            )
        layer = self.Layer
        if c.remat == "layer":
            policy = jax.checkpoint_policies.save_only_these_names(SELECTION)
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "experts": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            length=c.n_layers,
            unroll=c.unroll,
        )(c, self.experts, self.balance, self.transport, self.settings, self.training)
        self.final_norm = make_norm(c)
        if c.output_bias:
            self.output_bias = self.param(
                "output_bias", nn.initializers.zeros_init(), (c.vocab_size,)
            )

    def features(self, tokens, segment_ids=None, token_weights=None, routing_state=None):
        """Everything but the output projection.

        Args:
          tokens: `[B, S]` int32.
          segment_ids: `[B, S]` int32 document numbers to attend within, or None.
          token_weights: `[B, S]`, 0 for padding, which then counts in no statistic; None: all
            count.
          routing_state: what the selection method has beside parameters, arrays `[L, ...]` by name;
            None: that before training.

        Returns:
          `(hidden, stats)`: `[B, S, d]` in the dtype of computation, and `LayerStats` stacked over
            layers.
        """
        with jax.named_scope("embed"):
            x = embed(self.embed.embedding, tokens, jnp.dtype(self.model.dtype))
        x, stats = self.layers(
            x, segment_ids, token_weights, routing_state, jnp.arange(self.model.n_layers)
        )
        return self.final_norm(x), stats

    def __call__(self, tokens, segment_ids=None, token_weights=None, routing_state=None):
        """Logits `[B, S, V]` float32, and `LayerStats` stacked over layers; arguments as in
        `features`.
        """
        hidden, stats = self.features(tokens, segment_ids, token_weights, routing_state)
        table = (self.embed if self.model.tie_embeddings else self.output).embedding
        return logits(hidden, table, self.output_bias if self.model.output_bias else None), stats


def initial_routing_state(config: Config):
    """What the selection method has beside parameters before the first step, `[L, ...]` by name."""
    if not LAYERS[config.experts.kind].selects:
        return {}
    method, d = SELECTIONS[config.experts.selection], config.model.d_model
    of_layer = method.initial_state(config.experts, config.balance, config.method_settings, d)
    return {
        name: jnp.broadcast_to(a, (config.model.n_layers, *a.shape)) for name, a in of_layer.items()
    }


def output_projection(params):
    """The output projection among the parameters: `[V, d]` (the embedding table where it is
    shared), bias `[V]` or None.
    """
    return params.get("output", params["embed"])["embedding"], params.get("output_bias")


def logits(hidden, table, bias=None):
    """`hidden [..., d]`, `table [V, d]`, `bias [V]` or None -> `[..., V]`, float32 at least."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    y = jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=dtype
    )
    return y if bias is None else y + bias

"""A Llama-style decoder: a scan over dense layers, if any, and a scan over layers of experts."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.methods import find_method
from aoe_jax.model.attention.blocks import KEPT_ATTENTION
from aoe_jax.model.attention.multi_head import Attention
from aoe_jax.model.vocabulary import embed, logits
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.moe.routing import Method, TopK
from aoe_jax.moe.scoring import KEPT_ROUTING

# The backward pass recomputes norms; otherwise it would keep float32 copies of their inputs.
RMSNorm = nn.remat(nn.RMSNorm, prevent_cse=False)


def make_norm(c: ModelConfig):
    """Makes the module of a norm before attention, experts or the output projection."""
    return RMSNorm(epsilon=c.norm_eps, dtype=jnp.dtype(c.dtype))


def dense_layer(c: ModelConfig):
    """The settings `(experts, routing, balance)` of the dense layers."""
    experts = ExpertsConfig(kind="dense", d_ffn=c.d_dense)
    return experts, find_method("dense")(), BalanceConfig(aux_weight=0.0)


class DecoderLayer(nn.Module):
    """Attention and experts, each applied after a norm and added to the residual stream."""

    model: ModelConfig
    experts: ExpertsConfig
    routing: Method
    balance: BalanceConfig
    transport: str
    training: bool
    observe: Callable | None = None

    def setup(self):
        """Makes the modules."""
        self.attention_norm, self.experts_norm = make_norm(self.model), make_norm(self.model)
        self.attention = Attention(self.model, self.routing.hooks.attention)
        self.experts_layer = ExpertsLayer(
            experts=self.experts,
            routing=self.routing,
            balance=self.balance,
            dtype=jnp.dtype(self.model.dtype),
            remat=self.model.remat,
            transport=self.transport,
            training=self.training,
            observe=self.observe,
            name="experts",
        )

    def __call__(self, x, tokens, segment_ids, token_weights, routing_state, layer_index):
        """`x [B, S, d]` -> `([B, S, d], LayerStats)`: carry and output of `nn.scan`."""
        attend = partial(self.attention, segment_ids=segment_ids)
        return self._layer(attend, x, tokens, token_weights, routing_state, layer_index)[0]

    def decode(self, x, tokens, past, routing_state, layer_index):
        """`x [B, S, d]` -> `([B, S, d], (keys, values))`.

        `past` is the `(cache, n_past)` of `Attention.extend`; None at the beginning of a text.
        """
        attend, positions = partial(self.attention, with_cache=True), None
        if past is not None:
            attend = partial(self.attention.extend, cache=past[0], n_past=past[1])
            positions = past[1][:, None] + jnp.arange(x.shape[1])
        (x, _), cache = self._layer(attend, x, tokens, None, routing_state, layer_index, positions)
        return x, cache

    def _layer(self, attend, x, tokens, token_weights, routing_state, layer_index, positions=None):
        with jax.named_scope("attention"):
            y, captured, cache = attend(self.attention_norm(x))
            x = x + y
        of_tokens = captured, layer_index, positions, tokens
        y, stats = self.experts_layer(
            self.experts_norm(x), token_weights, routing_state, *of_tokens
        )
        return (x + y, stats), cache


class Decoder(nn.Module):
    """The language model: embedding, layers of attention and experts, output projection.

    Attributes:
      training: whether layers may use random numbers and record losses, which training needs.
      observe: passed to the layers of experts; see `moe.layer.ExpertsLayer`.
    """

    model: ModelConfig
    experts: ExpertsConfig
    routing: Method = TopK()
    balance: BalanceConfig = BalanceConfig()
    transport: str = "ring"
    training: bool = False
    observe: Callable | None = None

    @classmethod
    def from_config(cls, c: Config, training: bool = False) -> "Decoder":
        """The decoder of a whole configuration."""
        return cls(c.model, c.experts, c.routing, c.balance, c.mesh.transport, training)

    def setup(self):
        """Makes the modules; parameters are stacked over layers, `[L, ...]`."""
        c = self.model
        if c.vocab_size is None:
            raise ValueError("ModelConfig(vocab_size=None): give the decoder's number of tokens")
        init = nn.initializers.normal(c.d_model**-0.5)
        self.embed = nn.Embed(c.vocab_size, c.d_model, embedding_init=init)
        if not c.tie_embeddings:
            self.output = nn.Embed(c.vocab_size, c.d_model, embedding_init=init)
        layer = DecoderLayer
        policies = jax.checkpoint_policies
        if c.remat == "full":
            policy = policies.save_only_these_names(KEPT_ROUTING)
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        elif c.remat == "layer":
            from aoe_jax.model.attention.cudnn import is_cudnn_forward

            kept = policies.save_only_these_names(KEPT_ROUTING, KEPT_ATTENTION)
            policy = policies.save_from_both_policies(kept, is_cudnn_forward)
            layer = nn.remat(layer, policy=policy, prevent_cse=False)

        def stack(length, *kind, observe=None):
            scan = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "experts": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
                length=length,
                unroll=min(c.unroll, length),
            )
            return scan(c, *kind, self.transport, self.training, observe)

        if c.n_dense_layers:
            self.dense_layers = stack(c.n_dense_layers, *dense_layer(c))
        kind = self.experts, self.routing, self.balance
        self.layers = stack(c.n_layers, *kind, observe=self.observe)
        self.final_norm = make_norm(c)

    def features(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        token_weights: jax.Array | None = None,
        routing_state: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, LayerStats]:
        """Computes the hidden states before the output projection.

        Args:
          tokens: `[B, S]` int32.
          segment_ids: `[B, S]` int32 document numbers, or None; attention stays within a document.
          token_weights: `[B, S]`, 1, or 0 for padding, which no statistic counts; None: all are 1.
          routing_state: `Method.state` of all layers, `[L, ...]` by name; None: the initial state.

        Returns:
          `(hidden [B, S, d], LayerStats [L, ...])`, hidden in the dtype of computation.
        """
        with jax.named_scope("embed"):
            x = embed(self.embed.embedding, tokens, jnp.dtype(self.model.dtype))
        if n_dense := self.model.n_dense_layers:
            numbers = jnp.arange(n_dense)
            x, _ = self.dense_layers(x, tokens, segment_ids, token_weights, {}, numbers)
        numbers = jnp.arange(self.model.n_layers)
        x, stats = self.layers(x, tokens, segment_ids, token_weights, routing_state, numbers)
        return self.final_norm(x), stats

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        token_weights: jax.Array | None = None,
        routing_state: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, LayerStats]:
        """Returns logits `[B, S, V]` float32 and `LayerStats`; see `features` for the arguments."""
        hidden, stats = self.features(tokens, segment_ids, token_weights, routing_state)
        table = (self.embed if self.model.tie_embeddings else self.output).embedding
        return logits(hidden, table), stats


def initial_params(config: Config, seed):
    """The parameters before the first step."""
    # The shape of a micro-batch, because the mesh divides it evenly.
    shape = (config.train.batch_size // config.train.accumulate, config.data.seq_len)
    decoder = Decoder.from_config(config)
    return decoder.init(jax.random.key(seed), jnp.zeros(shape, jnp.int32))["params"]


def initial_routing_state(config: Config):
    """The routing state before the first step, `[L, ...]` by name."""
    n_layers, d_model = config.model.n_layers, config.model.d_model
    of_layer = config.routing.state(config.experts, config.balance, d_model)
    return {name: jnp.broadcast_to(a, (n_layers, *a.shape)) for name, a in of_layer.items()}


def output_projection(params):
    """The table `[V, d]` of the output projection, which may be the embedding table."""
    return params.get("output", params["embed"])["embedding"]

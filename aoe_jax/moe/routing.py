"""Routers compute the experts of each token and their weights from scores `[T, n]`.

A router is a frozen dataclass of its own settings with `__call__(scores, weights, ctx) -> Routing`.
Scores may be norms or logits. This file contains the paper's top-k router; the other routers are in
`aoe_jax/methods/`. `Method` lists what a router or a layer may define in addition to `__call__`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.config.checks import Group
from aoe_jax.moe.load_balance import updated_bias
from aoe_jax.moe.scoring import KEPT_ROUTING


@dataclass(frozen=True)
class Context:
    """The inputs of a method besides scores and weights."""

    devices: Any  # `collectives.Devices`, for collectives between devices
    x: jax.Array  # [T, d], the tokens
    token_weights: jax.Array  # [T], 1 for a token that counts, 0 for padding
    top_k: int
    training: bool
    state: dict[str, jax.Array] = field(default_factory=dict)  # `Method.state` of this layer
    rng: jax.Array | None = None  # the same on all devices; None outside training
    captured: jax.Array | None = None  # [T, H], the result of `Hooks.attention`
    positions: jax.Array | None = None  # [T] int32, the position in the sequence
    layer_index: jax.Array | int = 0
    token_ids: jax.Array | None = None  # [T] int32; None outside a `Decoder`

    def key(self):
        """The random key of this layer and step. Raises ValueError if `rng` is None."""
        if self.rng is None:
            wanted = "pass rngs={'experts': key}, in NNX rngs=nnx.Rngs(experts=0)"
            raise ValueError(f"this layer needs a key in training: {wanted}")
        return self.rng


class Routing(NamedTuple):
    """The experts of each token and their weights: each of P slots is one token-expert pair.

    If tokens choose experts, every token has `slots_per_token` slots, and slots are in the order of
    tokens. An unused slot has expert n and weight 0.
    """

    token: jax.Array  # [P] int32
    expert: jax.Array  # [P] int32
    weight: jax.Array  # [P] float32
    slots_per_token: int | None  # None: slots are unordered
    # Inputs of `Method.losses` and `Method.update`; all devices have equal values and gradients.
    records: dict[str, jax.Array] | None = None
    # Fractions of tokens: `Method.losses` gets their mean over the step's micro-batches so far.
    shares: dict[str, jax.Array] | None = None
    per_token: dict[str, jax.Array] | None = None  # [T] each, for `Method.losses`
    live: jax.Array | None = None  # [n], 1 for an expert in use, else 0; None: all are used
    added: jax.Array | None = None  # [T, d], added to the sum of the experts' outputs


@dataclass(frozen=True)
class Causality:
    """Whether a token's output depends on later tokens or on other sequences."""

    reason: str = ""  # why the method is not causal; empty if it is causal
    until_step: int | None = None  # the step from which a non-causal method is causal; None: never
    no_decoding: str = ""  # why incremental decoding is unsupported; empty if it is supported
    padding_counts: bool = False  # whether padding affects the outputs of real tokens


@dataclass(frozen=True)
class Choice:
    """How tokens choose their experts."""

    per_token: float | None = None  # mean number of experts of a token; None: the scores decide it
    is_fixed: bool = False  # whether every token has exactly this number
    # Whether weights are the softmax over the chosen scores, so no other score has a gradient.
    is_normalised: bool = False


def one_pass(features, key, sum_over_targets):
    """The default of `Hooks.training_sums`: the cross-entropy of one forward pass."""
    hidden, stats = features(key)
    nll = sum_over_targets(hidden)
    return nll, nll, {}, stats


class Hooks(NamedTuple):
    """Functions that a method may replace."""

    # Maps scores to the logits whose softmax the balance losses use: `[T, n] -> [T, n]`.
    balance_logits: Callable = lambda scores: scores
    # Computes scores in place of a router's or AoE's: `(method, x [T, d], weights, ctx) -> [T, n]`.
    scores: Callable | None = None
    # Computes a value per head and query from rotated queries and keys of the layer's attention:
    # `(q [B, H, S, h], k [B, G, c, h], visible) -> [B, H, S]`. `visible` is a bool array that
    # broadcasts to `[B, S, c]`. The router gets the result as `Context.captured`.
    attention: Callable | None = None
    # Computes sums over the targets of a batch: `(features, key, sum_over_targets) -> (loss, nll,
    # further sums by name, LayerStats)`. `features(key) -> (hidden [B, S, d], LayerStats)` is a
    # forward pass. `sum_over_targets(hidden, function) -> sums` calls `vocabulary.sum_over_tokens`
    # with this function, by default the cross-entropy.
    training_sums: Callable = one_pass
    passes: int = 1  # number of forward passes in `training_sums`


class Method(Group):
    """The base class of routers and layers. By default: causal, no parameters, state or losses."""

    group = "routing"
    name: ClassVar[str] = ""
    hooks: ClassVar[Hooks] = Hooks()

    def causality(self, experts) -> Causality:
        """Whether the method is causal with this `ExpertsConfig`."""
        return Causality()

    def check_training(self):
        """Raises a `UserError` if the method is for trained models only."""

    def choice(self, experts) -> Choice | None:
        """How tokens choose experts; None: each token uses one random or merged expert."""
        return Choice()

    def parameters(self, experts) -> dict:
        """`Parameter`s of one layer by name, in the order in which they are initialised."""
        return {}

    def state(self, experts, balance, d) -> dict[str, jax.Array]:
        """The arrays of one layer that training changes without gradients; saved with the model."""
        return {}

    def losses(self, stats, state, weights) -> dict[str, tuple]:
        """Further losses of the whole model, name -> `(weight, value)`; the value is logged.

        `stats` (`LayerStats`), `state` (before the step), `weights` (by name): stacked over layers.
        """
        return {}

    def update(self, config, state, stats, weights) -> tuple[dict, dict]:
        """Returns `(new state, parameters that the method itself changes, by name)` after a step.

        The optimiser's moments do not change. The arguments are those of `losses`, except that
        `weights` are the parameters after the optimiser's update.
        """
        return state, {}

    def flops(self, config) -> float | None:
        """Training FLOPs per token of a layer's router; None: 6 per element of its matrices."""
        return None


def state_shapes(method, experts, balance, d):
    """The shapes of `Method.state`; makes no arrays, because checks must not start JAX devices."""
    return jax.eval_shape(lambda: method.state(experts, balance, d))


def by_token(expert, weight):
    """A `Routing` of `expert [T, K]` and `weight [T, K]`. Raises `ValueError` for other arrays."""
    is_int, shape = jnp.issubdtype(expert.dtype, jnp.integer), expert.shape
    if not is_int or len(shape) != 2 or shape != weight.shape:
        found = f"{expert.dtype}{expert.shape}, {weight.dtype}{weight.shape}"
        raise ValueError(f"by_token needs experts, int [T, K], and weights [T, K]; got {found}")
    n_tokens, k = expert.shape
    token = jnp.repeat(jnp.arange(n_tokens, dtype=jnp.int32), k)
    return Routing(token, expert.reshape(-1), weight.reshape(-1), k)


def by_mask(chosen, weight):
    """A `Routing` of a mask `chosen [T, n]` and `weight [T, n]`, with n slots per token."""
    n_experts = chosen.shape[1]
    expert = jnp.where(chosen, jnp.arange(n_experts, dtype=jnp.int32), n_experts)
    return by_token(expert, jnp.where(chosen, weight, 0))


def best_experts(scores, k, bias=None):
    """The k experts of highest score plus bias, `[T, k]`; in ties the lower number is first."""
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    return checkpoint_name(jax.lax.top_k(ranked, k)[1], KEPT_ROUTING)


def top_k(scores, k, norm_topk_prob=True, bias=None):
    """Routes tokens to the k experts of highest `scores [T, n]` (Algorithms 1 and 2); `P = T k`.

    Weights are the softmax over the k chosen scores (the paper). Without `norm_topk_prob` they are
    the softmax over all n scores (the authors' released code). `bias [n]` affects the choice only.
    """
    expert = best_experts(scores, k, bias)
    if norm_topk_prob:
        return by_token(expert, jax.nn.softmax(jnp.take_along_axis(scores, expert, axis=1)))
    return by_token(expert, jnp.take_along_axis(jax.nn.softmax(scores), expert, axis=1))


class FixedK(Method):
    """The base class of routers that route every token to `experts.top_k` experts.

    With `balance.bias_rate`, a bias (state `selection_bias [n]`) balances the load.
    """

    # Whether weights are the softmax over the chosen scores, which AoE then computes itself. A
    # subclass that defines `__call__` must set it again.
    norm_topk_prob = False
    always_biased = False  # whether there is a bias without `balance.bias_rate`, too

    def choice(self, experts):
        # A subclass that overrides `__call__` alone may compute other weights.
        owner = next((of for of in type(self).__mro__ if "__call__" in vars(of)), FixedK)
        is_normalised = self.norm_topk_prob and "norm_topk_prob" in vars(owner)
        return Choice(experts.top_k, is_fixed=True, is_normalised=is_normalised)

    def state(self, experts, balance, d):
        is_biased = self.always_biased or balance.bias_rate
        return {"selection_bias": jnp.zeros(experts.n_experts)} if is_biased else {}

    def update(self, config, state, stats, weights):
        rate = config.balance.bias_rate
        bias = updated_bias(state["selection_bias"], stats.load, stats.score_spread, rate)
        return {"selection_bias": bias}, {}


@dataclass(frozen=True)
class TopK(FixedK):
    """Routes every token to the `experts.top_k` experts of highest score: the paper's router."""

    name = "top_k"

    norm_topk_prob: bool = True  # weights are the softmax over the chosen scores; False: over all

    def __call__(self, scores, weights, ctx):
        return top_k(scores, ctx.top_k, self.norm_topk_prob, ctx.state.get("selection_bias"))

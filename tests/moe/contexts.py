"""Contexts of layers without a mesh, statistics from arrays, and random parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config.experts import BalanceConfig
from aoe_jax.methods.expert_choice import ExpertChoice
from aoe_jax.methods.top_p import TopP
from aoe_jax.moe import layer as moe_layer
from aoe_jax.moe import load_balance
from aoe_jax.moe.collectives import Devices
from aoe_jax.moe.routing import Context, Routing
from aoe_jax.moe.scoring import Scores


def context(scores, token_weights=None, top_k=2, training=False, shape=None, **others):
    """The `Context` of a router on one device, for tokens with `scores [T, n]`."""
    n_tokens = scores.shape[0]
    return Context(
        devices=Devices(shape=shape or (n_tokens,)),
        x=others.pop("x", jnp.zeros((n_tokens, 1))),
        token_weights=jnp.ones(n_tokens) if token_weights is None else token_weights,
        top_k=top_k,
        training=training,
        **others,
    )


def top_p(scores, p):
    return TopP(p)(scores, {}, context(scores))


def expert_choice(scores, capacity_factor, token_weights=None):
    return ExpertChoice(capacity_factor)(scores, {}, context(scores, token_weights))


def layer_stats(scores, for_balance, routing, token_weights, stride=1):
    """`LayerStats` of one layer on one device."""
    config, ctx = BalanceConfig(aux_tokens=1 / stride), context(scores, token_weights)
    return load_balance.statistics(Scores(scores, for_balance), routing, config, ctx)


def sequence_balance_loss(for_balance, routing, token_weights, n_sequences, stride=1):
    """The balance loss of sequences of equal length."""
    shape = (n_sequences, token_weights.shape[0] // n_sequences)
    ctx = context(token_weights[:, None], token_weights, shape=shape)
    return load_balance.sequence_balance_loss(Scores(None, for_balance), routing, ctx, stride)


def top_p_weights(p, threshold):
    """Weights `[T, n]` of top-p by scores `p [T, n]`, expert by expert."""
    probability = jax.nn.softmax(p)
    order = jnp.argsort(-probability, axis=1, stable=True)
    tokens = jnp.arange(len(p))
    weights, total = jnp.zeros_like(p), jnp.zeros(len(p))
    for expert in order.T:
        weight = probability[tokens, expert]
        weights = weights.at[tokens, expert].set(jnp.where(total <= threshold, weight, 0))
        total = total + jax.lax.stop_gradient(weight)
    return weights


def expert_choice_weights(p, capacity):
    """Weights `[T, n]`: an expert takes its `capacity` tokens of highest probability."""
    probability = jax.nn.softmax(p)
    rank = jnp.argsort(jnp.argsort(-probability, axis=0, stable=True), axis=0)
    return jnp.where(rank < capacity, probability, 0)


def routing_of_slots(slots_per_token):
    """A `Routing` with a number of slots per token and nothing else."""
    return Routing(None, None, None, slots_per_token)


def parameters_of(layer, x, seed=1):
    """Parameters for tokens `x`, in their dtype. Matrices have the variance of `layer.init`, and
    vectors, which `layer.init` would set to constants, a standard deviation of 0.1.
    """
    draw, sizes = np.random.default_rng(seed).standard_normal, layer.experts.sizes(x.shape[-1])
    declared = moe_layer.parameters_of(layer.experts, layer.routing)
    shapes = {name: parameter.shape(sizes) for name, parameter in sorted(declared.items())}
    return {
        name: jnp.asarray(draw(shape) * (shape[-2] ** -0.5 if len(shape) > 1 else 0.1), x.dtype)
        for name, shape in shapes.items()
    }

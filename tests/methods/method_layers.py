"""Layers with random parameters, their comparison with a formula, and small models."""

import jax
import jax.numpy as jnp

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.moe import reference
from tests.arrays import assert_close, normal
from tests.moe.contexts import parameters_of

TOKENS, D, EXPERTS = 29, 12, 5
SMALL = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "vocab_size": 50, "dtype": "float32"},
    "experts": {"n_experts": 4, "d_ffn": 24, "d_low": 4},
}


def small_config(**changes):
    """The configuration of a small model, with changes `group={field: value}`."""
    groups = {name: SMALL.get(name, {}) | changes.get(name, {}) for name in SMALL | changes}
    return Config.from_config_dict(groups)


def make(kind, routing, shape=(TOKENS, D), recompute=False, training=True, **experts):
    """`(layer, parameters, tokens)` in the widest dtype that JAX has enabled."""
    sizes = {"n_experts": EXPERTS, "top_k": 2, "d_ffn": 16, "d_low": 4} | experts
    x = normal(0, shape)
    layer = ExpertsLayer(
        ExpertsConfig(kind=kind, **sizes),
        routing=routing,
        dtype=x.dtype,
        remat="experts" if recompute else "none",
        training=training,
    )
    return layer, parameters_of(layer, x), x


def scores_of(params, x):
    """Norms or logits."""
    if "w_gate_down" in params:
        return reference.aoe_scores(x, params["w_gate_down"])
    return x @ params["w_router"]


def by_loops(params, x, weights):
    """The output of experts on tokens `[..., d]` with weights `[..., n]`."""
    if "w_gate_down" in params:
        apply, names = reference.aoe_experts, ("w_gate_down", "w_gate_up", "w_up", "w_down")
    else:
        apply, names = reference.router_experts, ("w_gate", "w_up", "w_down")
    flat, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    return apply(flat, weights, *(params[name] for name in names)).reshape(x.shape)


def with_gradients(function, params, x):
    """The gradients of the sum of squares of the first result, and all results."""

    def loss(params, x):
        results = function(params, x)
        return (results[0] ** 2).sum(), results

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def assert_agree(layer, params, x, formula, **arguments):
    """Compares output and gradients in float64 with those of `formula(params, x)`; returns the
    statistics of the layer.
    """
    arguments = jax.tree.map(jnp.asarray, arguments)

    @jax.jit
    def apply(params, x):
        return layer.apply({"params": params}, x, **arguments)

    got, (y, stats) = with_gradients(apply, params, x)
    want, (wanted_y,) = with_gradients(lambda params, x: (formula(params, x),), params, x)
    assert_close((y, got), (wanted_y, want), 1e-10)
    return stats

"""Small layers of a router, the same by plain loops from the weights that it should give, and small
models.
"""

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods import find_method
from aoe_jax.moe import reference
from tests.arrays import assert_close, normal
from tests.moe.drawn import parameters_of

TOKENS, D, EXPERTS = 29, 12, 5
SMALL = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "vocab_size": 50, "dtype": "float32"},
    "experts": {"n_experts": 4, "d_ffn": 24, "d_low": 4},
}


def small_config(**changes):
    """The configuration of a small model, with changes `group={field: value}`."""
    groups = {name: SMALL.get(name, {}) | changes.get(name, {}) for name in SMALL | changes}
    return Config.from_config_dict(groups)


def make(kind, name, training=True, dtype=jnp.float64, recompute=False, **settings):
    """`(layer, parameters, tokens)`; all parameters are random, those of the router too."""
    layer = ExpertsLayer(
        ExpertsConfig(kind=kind, n_experts=EXPERTS, top_k=2, d_ffn=16, d_low=4),
        routing=find_method(name)(**settings),
        dtype=jnp.dtype(dtype),
        remat="experts" if recompute else "none",
        training=training,
    )
    x = normal(0, (TOKENS, D), dtype)
    noise = 0.05 * np.random.default_rng(2).standard_normal(EXPERTS)
    params = jax.tree.map(
        lambda a: (a + noise).astype(dtype) if a.ndim == 1 else a, parameters_of(layer, x)
    )
    return layer, params, x


def scores_of(params, x):
    """Norms or logits."""
    if "w_gate_down" in params:
        return reference.aoe_scores(x, params["w_gate_down"])
    return x @ params["w_router"]


def by_loops(params, x, weights):
    """The layer's output from weights `[T, n]`."""
    if "w_gate_down" in params:
        experts, names = reference.aoe_experts, ("w_gate_down", "w_gate_up", "w_up", "w_down")
    else:
        experts, names = reference.router_experts, ("w_gate", "w_up", "w_down")
    return experts(x, weights, *(params[name] for name in names))


def assert_agree(layer, params, x, weights_of):
    """Compares the layer and its gradients with the loops; `weights_of(params, x)` gives the
    weights.
    """

    def fast(params, x):
        y = layer.apply({"params": params}, x)[0]
        return (y**2).sum(), y

    def slow(params, x):
        y = by_loops(params, x, weights_of(params, x))
        return (y**2).sum(), y

    fast, slow = (jax.value_and_grad(f, (0, 1), has_aux=True) for f in (fast, slow))
    assert_close(jax.jit(fast)(params, x), slow(params, x), 1e-10)

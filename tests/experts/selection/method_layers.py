"""Small layers of a selection method, and the same by plain loops from the weights that it should
give.
"""

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config import BalanceConfig, ExpertsConfig
from aoe_jax.config.methods import METHODS
from aoe_jax.experts import reference
from aoe_jax.experts.kinds import LAYERS
from tests.experts.drawn import parameters_of

TOKENS, D, EXPERTS = 29, 12, 5


def make(kind, selection, training=True, dtype=jnp.float64, recompute=False, **settings):
    """`(layer, parameters, tokens)`; parameters all at random, those of the method too."""
    config = ExpertsConfig(
        kind=kind, selection=selection, n_experts=EXPERTS, top_k=2, d_ffn=16, d_low=4
    )
    of_method = {"settings": METHODS[selection](**settings), "training": training}
    layer = LAYERS[kind](config, jnp.dtype(dtype), BalanceConfig(), recompute, **of_method)
    x = jax.random.normal(jax.random.key(0), (TOKENS, D), dtype)
    noise = 0.05 * np.random.default_rng(2).standard_normal(EXPERTS)
    params = jax.tree.map(
        lambda a: (a + noise).astype(dtype) if a.ndim == 1 else a, parameters_of(layer, x)
    )
    return layer, params, x


def scores_of(params, x):
    """Norms or logits."""
    return (
        reference.aoe_scores(x, params["w_down"]) if "w_down" in params else x @ params["w_router"]
    )


def by_loops(params, x, weights):
    """The layer's output from weights `[T, n]`."""
    names = ("w_down", "w_up", "w_p", "w_o") if "w_down" in params else ("w_g", "w_p", "w_o")
    experts = reference.aoe_experts if "w_down" in params else reference.router_experts
    return experts(x, weights, *(params[name] for name in names))


def assert_agree(layer, params, x, weights_of, routing_state=None):
    """The layer against the loops, with gradients; `weights_of(params, x)` gives the weights."""

    def loss(apply):
        return lambda params, x: (apply(params, x) ** 2).sum()

    def fast(params, x):
        return layer.apply({"params": params}, x, routing_state=routing_state)[0]

    def slow(params, x):
        return by_loops(params, x, weights_of(params, x))

    for function in (lambda f: f, lambda f: jax.grad(loss(f), (0, 1))):
        got, want = (jax.jit(function(f))(params, x) for f in (fast, slow))
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10 * max(1, float(jnp.abs(b).max())))

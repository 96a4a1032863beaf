"""Union-of-Experts-style layers by plain loops, their initialisation, and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax import ExpertsLayer
from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.methods.uoe import UoE
from aoe_jax.model.counts import parameter_counts
from aoe_jax.moe import reference
from tests.methods import method_layers
from tests.methods.method_layers import assert_agree, small_config
from tests.moe.contexts import top_p_weights

N, D, WIDTH, ROUTING = 8, 8, 16, 4
BIAS = np.array([0.0, -50, 0, 50, 0, 0, 0, 0])

pytestmark = pytest.mark.smoke


def make(shape=(16, 8, D), recompute=False, **settings):
    routing = UoE(routing_neurons=ROUTING, **settings)
    return method_layers.make("uoe", routing, shape, recompute, n_experts=N, d_ffn=WIDTH)


def by_loops(params, x, method, bias):
    """The outputs and scores, from each expert's first neurons and then from the others."""
    shape, x = x.shape, x.reshape(-1, D)
    activations = [
        jax.nn.silu(x @ w_gate) * (x @ w_up)
        for w_gate, w_up in zip(params["w_gate_route"], params["w_up_route"], strict=True)
    ]
    y = sum(a @ w_down for a, w_down in zip(activations, params["w_down_route"], strict=True))
    scores = jnp.stack([reference.l2_norm(a) for a in activations], axis=1)
    if method.p is not None:
        weights = top_p_weights(scores, method.p)
    else:
        is_chosen = reference.top_k_weights(jax.lax.stop_gradient(scores) + bias, 2) > 0
        kept = jnp.where(is_chosen, scores, -jnp.inf) if method.norm_topk_prob else scores
        weights = jax.nn.softmax(kept) * is_chosen
    y += reference.router_experts(x, weights, params["w_gate"], params["w_up"], params["w_down"])
    return y.reshape(shape), scores, weights


@pytest.mark.parametrize(
    ("settings", "recompute", "bias"),
    [
        ({}, True, 0 * BIAS),
        ({}, True, BIAS),
        ({"norm_topk_prob": False}, False, BIAS),
        ({"p": 0.6}, True, BIAS),  # a choice by p ignores the bias
    ],
    ids=str,
)
def test_agrees_with_loops(x64, ragged, settings, recompute, bias):
    """A selection bias changes the choice of top-k and not the weights. Some tokens are zero."""
    layer, params, x = make(recompute=recompute, **settings)
    layer = layer.clone(balance=BalanceConfig(z_weight=0.1, aux_batch="sequence"))
    x = x.at[0, :3].set(0)
    stats = assert_agree(
        layer,
        params,
        x,
        lambda params, x: by_loops(params, x, layer.routing, bias)[0],
        routing_state={"selection_bias": bias},
    )
    _, scores, weights = by_loops(params, x, layer.routing, bias)
    probability = jax.nn.softmax(scores)
    assert_allclose(stats.mean_score, scores.mean(axis=0))
    assert_allclose(stats.load, (weights > 0).mean(axis=0))
    assert_allclose(stats.mean_probability, probability.mean(axis=0))
    assert_allclose(stats.z_loss, jnp.square(jax.nn.logsumexp(scores, axis=1)).mean())
    load, share = (a.reshape(16, 8, N).mean(axis=1) for a in (weights > 0, probability))
    assert_allclose(stats.sequence_loss, N * (load * share).sum(axis=1).mean())


def test_drawn_like_whole_matrices():
    layer = ExpertsLayer(ExpertsConfig(kind="uoe", d_ffn=512), routing=UoE(routing_neurons=128))
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((4, 64)))["params"]
    for name, w in params.items():
        fan_in = 512 if "down" in name else 64
        assert abs(float(w.std()) * fan_in**0.5 - 1) < 0.02


def test_counts():
    """An expert has the parameters of a traditional one."""
    config, moe = (small_config(experts={"kind": kind, "d_ffn": 48}) for kind in ("uoe", "router"))
    c, d = config.experts, config.model.d_model
    assert config.routing == UoE() and config.routing.neurons(c) == 24  # d_ffn / top_k
    routers = config.model.n_layers * d * c.n_experts
    assert parameter_counts(config).total == parameter_counts(moe).total - routers

"""Routing-Free MoE: gates, its two losses, and the control of its density."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.routing_free import RoutingFree
from tests.arrays import normal
from tests.methods.method_layers import EXPERTS, TOKENS, assert_agree, by_loops, make, scores_of

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(("kind", "threshold"), [("aoe", 2.0), ("router", 0.5)])
def test_agrees_with_plain_loops(x64, ragged, kind, threshold):
    routing = RoutingFree(threshold=threshold)
    layer, params, x = make(kind, routing, recompute=kind == "router")

    def weights_of(params, x):
        gates = jax.nn.relu(scores_of(params, x) - params["score_bias"])
        return jnp.where(gates >= threshold, gates, 0)

    stats = assert_agree(layer, params, x, lambda p, x: by_loops(p, x, weights_of(p, x)))
    weights = weights_of(params, x)
    active = weights > 0
    assert 0.1 < active.mean() < 0.9
    assert_allclose(stats.load, active.mean(axis=0))
    assert_allclose(stats.records["gates"], weights.mean(axis=0))
    assert_allclose(stats.per_token["gates"], weights.mean(axis=1))
    assert_allclose(stats.per_token["active"], active.mean(axis=1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_of_a_model(x64, share):
    """`expert_share` divides it between experts and tokens, over `[T, L n]`; lambda is its weight;
    padding does not count.
    """
    gates = jax.nn.relu(normal(0, (3, TOKENS, EXPERTS)))
    active, real = (gates > 0).astype(float), np.arange(TOKENS) > 4
    f, g = (jnp.concatenate(list(a[:, real]), axis=1) for a in (active, gates))
    of_experts = (f.mean(axis=0) * g.mean(axis=0)).mean()
    of_tokens = (f.mean(axis=1) * g.mean(axis=1)).mean()
    per_token = {"active": active.mean(axis=2)[:, None], "gates": gates.mean(axis=2)[:, None]}
    per_token["weight"] = jnp.broadcast_to(real * 1.0, (3, 1, TOKENS))
    load, records = active[:, real].mean(axis=1), {"gates": gates[:, real].mean(axis=1)}
    stats = SimpleNamespace(load=load, records=records, per_token=per_token)
    losses = RoutingFree(expert_share=share).losses(stats, {"multiplier": jnp.full(3, 0.3)}, {})
    weight, value = losses["density_loss"]
    assert_allclose(value, share * of_experts + (1 - share) * of_tokens)
    assert weight == 0.3


@pytest.mark.parametrize(("density", "factor"), [(0.3, 1.1), (0.25, 1), (0.2, 1 / 1.1)])
def test_lambda_aims_at_k_of_n(density, factor):
    """The target is 1 of 4 experts per token, over all layers together; lambda is at most 1."""
    experts = ExpertsConfig(kind="router", n_experts=4, top_k=1)
    method = RoutingFree(rate=0.1)
    config = Config(experts=experts, routing=method, balance=BalanceConfig(0.0))
    load = jnp.array([[density + 0.25] * 4, [density - 0.25] * 4])
    before = {"multiplier": jnp.array([1e-3, 0.999])}
    state, changed = method.update(config, before, SimpleNamespace(load=load), {})
    assert changed == {}
    assert_allclose(state["multiplier"], [1e-3 * factor, min(0.999 * factor, 1)], rtol=1e-5)

"""Top-k as Switch has it, and loss-free balancing: what their papers say of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.run import Config
from aoe_jax.moe import reference
from aoe_jax.moe.balance import balance_loss, updated_bias
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.routing import top_k
from configs import methods
from tests.arrays import normal
from tests.moe.contexts import layer_stats


@pytest.mark.parametrize("variant", ["switch", "switch_router"])
def test_switch(ragged, variant):
    """`y = p_i E_i(x)` of the likeliest expert, and `n sum_i f_i P_i`, in which f has no
    gradient.
    """
    config = Config.from_config_dict(methods.get_config(variant))
    experts = dataclasses.replace(config.experts, n_experts=4, d_ffn=24, d_low=4)
    layer = ExpertsLayer(experts, config.routing, config.balance)
    x = normal(0, (30, 16))
    params = layer.init(jax.random.key(1), x)["params"]

    def by_formula(params, x):
        if experts.kind == "aoe":
            names, scores, apply = (
                ("w_gate_down", "w_gate_up"),
                reference.aoe_scores(x, params["w_gate_down"]),
                reference.aoe_experts,
            )
        else:
            names, scores, apply = ("w_gate",), x @ params["w_router"], reference.router_experts
        p = jax.nn.softmax(scores)
        first = jax.nn.one_hot(p.argmax(axis=1), 4)
        y = apply(x, p * first, *(params[name] for name in (*names, "w_up", "w_down")))
        return y, 4 * (first.mean(axis=0) * p.mean(axis=0)).sum()

    def by_layer(params, x):
        y, stats = layer.apply({"params": params}, x)
        return y, balance_loss(stats.load, stats.mean_probability)

    @partial(jax.jit, static_argnums=0)
    def with_gradients(function):
        value, pull_back = jax.vjp(function, params, x)
        return value, pull_back((jnp.ones_like(x), jnp.ones(())))

    jax.tree.map(
        partial(assert_allclose, rtol=1e-4, atol=1e-5),
        with_gradients(by_layer),
        with_gradients(by_formula),
    )
    assert config.balance.aux_weight == 0.01 and config.balance.aux_tokens == 1


def bias_of(expert, value, n=8):
    return jnp.zeros(n).at[expert].set(value)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_bias_chooses_always_and_weighs_nothing(norm_topk_prob):
    """By 1e3: the weights are those of the unbiased scores of the chosen."""
    scores = normal(0, (50, 8))
    found = top_k(scores, 2, norm_topk_prob, bias_of(5, 1e3))
    expert, weight = found.expert.reshape(50, 2), found.weight.reshape(50, 2)
    assert (expert[:, 0] == 5).all()
    chosen = jnp.take_along_axis(scores, expert, axis=1)
    p = jax.nn.softmax(scores)
    want = jax.nn.softmax(chosen) if norm_topk_prob else jnp.take_along_axis(p, expert, axis=1)
    assert_allclose(weight, want, rtol=1e-6)
    never = top_k(scores, 2, norm_topk_prob, bias_of(5, -1e3))
    assert not (never.expert == 5).any()


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_bias_has_no_gradient(norm_topk_prob):
    scores = normal(0, (50, 8))
    gradient = jax.grad(lambda bias: (top_k(scores, 2, norm_topk_prob, bias).weight ** 2).sum())(
        bias_of(5, 0.3)
    )
    assert_array_equal(gradient, 0)


def test_loss_free_balancing_of_a_skewed_stream():
    """The most loaded expert comes to within a tenth of the mean, and biases stay small."""
    n, k, n_tokens, rate = 8, 2, 512, 0.01
    skew = jnp.linspace(-0.5, 0.5, n)

    def step(bias, key):
        scores = skew + jax.random.normal(key, (n_tokens, n))
        stats = layer_stats(scores, scores, top_k(scores, k, bias=bias), jnp.ones(n_tokens))
        bias = updated_bias(bias[None], stats.load[None], stats.score_spread[None], rate)[0]
        return bias, (stats.load, bias)

    _, (load, bias) = jax.jit(partial(jax.lax.scan, step))(
        jnp.zeros(n), jax.random.split(jax.random.key(0), 400)
    )

    def violation(load):
        return float(load.max() / load.mean() - 1)

    assert violation(load[0]) > 0.7
    assert violation(load[-200:].mean(axis=0)) < 0.1
    assert float(jnp.abs(bias.sum(axis=1)).max()) < 1 and float(jnp.abs(bias).max()) < 1
    # This is what was to be undone.
    assert_allclose(bias[-1] - bias[-1].mean(), -skew, atol=0.1)

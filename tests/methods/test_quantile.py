"""Quantile balancing: its solution, moving averages, and the balance that it reaches."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.run import Config
from aoe_jax.methods.quantile import Quantile
from tests.arrays import normal
from tests.moe.contexts import context

N, T, K = 8, 400, 2


def routed(scores, bias, **settings):
    return Quantile()(
        scores, {}, context(scores, top_k=K, state={"selection_bias": bias}, **settings)
    )


def solution(scores, bias):
    """The formula of the module, by sorting."""
    next_best = np.sort(scores + bias, axis=1)[:, -K - 1]
    return -np.sort(scores - next_best[:, None], axis=0)[-(len(scores) * K // N) - 1]


def test_the_solution_is_that_of_sorting():
    """The share of the tokens is no whole number, and only every third token counts."""
    scores, bias = normal(0, (T + 1, N)) + jnp.linspace(-2, 3, N), normal(1, (N,))
    for weights, some in ((jnp.ones(T + 1), scores), (jnp.arange(T + 1) % 3 == 0, scores[::3])):
        routing = routed(scores, bias, training=True, token_weights=weights * 1.0)
        want = solution(np.asarray(some), np.asarray(bias))
        assert_allclose(routing.records["solution"], want, rtol=1e-5)
    assert routed(scores, bias).records is None
    nothing = routed(scores, bias, training=True, token_weights=jnp.zeros(T + 1))
    assert np.isnan(nothing.records["solution"]).all()


def test_the_choice_has_the_bias_and_the_weights_do_not():
    scores, bias = normal(0, (T, N)), normal(1, (N,))
    routing = routed(scores, bias)
    expert, weight = routing.expert.reshape(T, K), routing.weight.reshape(T, K)
    assert_array_equal(expert, jax.lax.top_k(scores + bias, K)[1])
    assert_allclose(weight, jax.nn.softmax(np.take_along_axis(scores, expert, 1)), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_updates_balance_scores_with_different_means(decay):
    """Most tokens choose one expert at first; in the end, each has its share of a new batch."""
    method, bias, means = Quantile(decay=decay), jnp.zeros(N), jnp.linspace(-2, 3, N)
    for number in range(30):
        scores = normal(number, (4000, N)) + means
        routing = routed(scores, bias, training=True)
        loads = np.bincount(routing.expert, minlength=N) / 4000 * N / K
        if number == 0:
            assert loads.max() > 3
        stats = SimpleNamespace(records=jax.tree.map(lambda a: a[None], routing.records))
        state, changed = method.update(Config(), {"selection_bias": bias[None]}, stats, {})
        found = routing.records["solution"]
        want = decay * bias + (1 - decay) * (found - found.mean())
        assert_allclose(state["selection_bias"][0], want, rtol=1e-6, atol=1e-7)
        assert changed == {}
        bias = state["selection_bias"][0]
    assert loads.max() < 1.1 and loads.min() > 0.9


def test_a_batch_without_tokens_changes_nothing():
    bias = normal(0, (1, N))
    stats = SimpleNamespace(records={"solution": jnp.full((1, N), jnp.nan)})
    state, _ = Quantile().update(Config(), {"selection_bias": bias}, stats, {})
    assert_array_equal(state["selection_bias"], bias)

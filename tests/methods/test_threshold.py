"""Expert Threshold routing: the share of tokens that experts take, and moving averages."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.threshold import Threshold
from tests.arrays import normal
from tests.moe.contexts import context

N, T = 8, 4000
EXPERTS = ExpertsConfig(kind="router", n_experts=N, top_k=1)


def first_state(method):
    return method.state(EXPERTS, BalanceConfig(), 4)


def after(steps, method, means, top_k=1):
    """`(state, loads [steps, n])` of training on normal scores with these means."""
    config = Config(experts=dataclasses.replace(EXPERTS, top_k=top_k), routing=method)
    state, loads = first_state(method), []

    @jax.jit
    def step(state, scores):
        routing = method(scores, {}, context(scores, top_k=top_k, training=True, state=state))
        load = (routing.expert[:, None] == jnp.arange(N)).sum(axis=0) / T
        stats = SimpleNamespace(records=jax.tree.map(lambda a: a[None], routing.records))
        stacked = jax.tree.map(lambda a: a[None], state)
        state, changed = method.update(config, stacked, stats, {})
        assert changed == {}
        return jax.tree.map(lambda a: a[0], state), load

    for number in range(steps):
        state, load = step(state, normal(number, (T, N)) + means)
        loads.append(load)
    return state, np.array(loads)


@pytest.mark.parametrize(("top_k", "warmup_steps"), [(1, 0), (2, 2)])
def test_experts_take_equal_shares_of_scores_with_different_means(top_k, warmup_steps):
    """Each takes K of 8 tokens, exactly in the warm-up and then on average."""
    method = Threshold(decay=0.9, warmup_steps=warmup_steps)
    _, loads = after(40, method, jnp.linspace(-2, 3, N), top_k)
    assert_allclose(loads[:warmup_steps], top_k / N, atol=1e-6)
    assert_allclose(loads[20:].mean(axis=0), top_k / N, atol=5e-3)


def test_experts_choose_in_the_warm_up():
    """Experts take their k best tokens, later those above the moving average of the k-th score."""
    means = jnp.arange(N) * 1.0
    state, loads = after(3, Threshold(decay=0.5, warmup_steps=2), means)
    assert_allclose(loads[:2], 1 / N, atol=1e-6)
    assert np.abs(loads[2] - 1 / N).max() > 1e-4 and state["updates"] == 3
    kth = [np.sort(normal(number, (T, N)) + means, axis=0)[-T // N] for number in range(3)]
    assert_allclose(state["threshold"], 0.25 * kth[0] + 0.25 * kth[1] + 0.5 * kth[2], atol=1e-5)


def test_a_batch_without_tokens_changes_nothing():
    """It does not count as a batch: the first threshold is that of the first batch with tokens."""
    method = Threshold(decay=0.5, warmup_steps=0)
    state = jax.tree.map(lambda a: a[None], first_state(method))
    for found, threshold, updates in ((jnp.nan, 0, 0), (2.0, 2, 1), (jnp.nan, 2, 1), (4.0, 3, 2)):
        stats = SimpleNamespace(records={"kth_largest": jnp.full((1, N), found)})
        state, _ = method.update(Config(experts=EXPERTS, routing=method), state, stats, {})
        assert_array_equal(state["threshold"], np.full((1, N), threshold))
        assert state["updates"] == updates


def test_the_share_is_of_tokens_that_count():
    scores, weights = normal(0, (T, N)), jnp.arange(T) % 4 == 0
    method = Threshold()

    def found(token_weights):
        given = {"training": True, "state": first_state(method), "token_weights": token_weights}
        return method(scores, {}, context(scores, top_k=1, **given)).records["kth_largest"]

    assert_array_equal(found(weights * 1.0), np.sort(scores[::4], axis=0)[-T // 4 // N])
    assert not np.isfinite(found(jnp.zeros(T))).any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "shift"), [("sigmoid", 0.0), ("relative", 0.5)])
def test_weights(training, kind, shift):
    """They are the sigmoid of the score, or of the score less the threshold; the gradient goes to
    the score. Thresholds are those before the step. Padding has no expert.
    """
    real = jnp.arange(T)[:, None] % 3 > 0
    state = {"threshold": jnp.full(N, 0.5), "updates": jnp.ones(())}
    scores, method = normal(0, (T, N)), Threshold(weights=kind, warmup_steps=0)

    def weights(scores):
        given = {"training": training, "state": state, "token_weights": real[:, 0] * 1.0}
        routing = method(scores, {}, context(scores, **given))
        assert (routing.records is None) == (not training)
        return routing.weight.reshape(T, N)

    want = np.where((scores > 0.5) & real, jax.nn.sigmoid(scores - shift), 0)
    assert_allclose(weights(scores), want, rtol=1e-6)
    slope = jax.grad(lambda scores: weights(scores).sum())(scores)
    assert_allclose(slope, want * (1 - want), atol=1e-6)

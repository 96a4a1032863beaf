"""Expert Threshold routing: the share of tokens that experts take, its causality, and its moving
averages.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.config.run import Config
from aoe_jax.methods.threshold import Threshold, above_thresholds, kth_largest
from tests.arrays import assert_equal, normal
from tests.moe.contexts import context

N, T = 8, 4000
EXPERTS = ExpertsConfig(kind="router", n_experts=N, top_k=1)


def routed(method, scores, state, training=True, top_k=1):
    """The `Routing` of tokens with these scores."""
    return method(scores, {}, context(scores, top_k=top_k, training=training, state=state))


def first_state(method):
    return method.state(EXPERTS, BalanceConfig(), 4)


def after(steps, method, scores_of, top_k=1):
    """`(state, loads [steps, n])` of training on scores."""
    experts = dataclasses.replace(EXPERTS, top_k=top_k)
    config = Config(experts=experts, routing=method)
    state, loads = first_state(method), []

    @jax.jit
    def step(state, scores):
        routing = routed(method, scores, state, top_k=top_k)
        load = (routing.expert[:, None] == jnp.arange(N)).sum(axis=0) / T
        stats = SimpleNamespace(records=jax.tree.map(lambda a: a[None], routing.records))
        stacked = jax.tree.map(lambda a: a[None], state)
        state, changed = method.update(config, stacked, stats, {})
        assert changed == {}
        return jax.tree.map(lambda a: a[0], state), load

    for number in range(steps):
        state, load = step(state, scores_of(number))
        loads.append(load)
    return state, np.array(loads)


def gaussian(number, means):
    return normal(number, (T, N)) + means


def test_experts_take_equal_shares_of_scores_with_different_means():
    """Each takes 1 of 8 tokens. Shifting all scores shifts only the thresholds."""
    means, method = jnp.linspace(-2, 3, N), Threshold(decay=0.9, warmup_steps=0)
    state, loads = after(60, method, lambda number: gaussian(number, means))
    assert_allclose(loads[20:].mean(axis=0), 1 / N, atol=3e-3)
    shifted, same = after(60, method, lambda number: gaussian(number, means + 5))
    assert_allclose(shifted["threshold"] - state["threshold"], 5, atol=1e-4)
    assert_allclose(same[20:].mean(axis=0), 1 / N, atol=3e-3)


def test_a_token_is_routed_by_itself():
    """Thresholds are those before the step, so other tokens change nothing in training after the
    warm-up, nor in evaluation.
    """
    method = Threshold(warmup_steps=0)
    state = {"threshold": jnp.linspace(-1, 1, N), "updates": jnp.ones(())}
    scores = gaussian(0, 0.0)
    others = scores.at[1:].set(gaussian(1, 3.0)[1:])
    for training in (True, False):
        found = [routed(method, s, state, training) for s in (scores, others)]
        first = [(routing.expert[:N], routing.weight[:N]) for routing in found]
        assert_equal(*first)
        assert (found[0].records is None) == (not training)
    assert_array_equal(first[0][0] < N, above_thresholds(scores[0], state["threshold"]))


def test_experts_choose_in_the_warm_up():
    """Experts take their k best tokens, later those above the moving average of the k-th score."""
    method = Threshold(decay=0.5, warmup_steps=2)
    state, loads = after(3, method, lambda number: gaussian(number, jnp.arange(N) * 1.0))
    assert_allclose(loads[:2], 1 / N, atol=1e-6)
    assert np.abs(loads[2] - 1 / N).max() > 1e-4 and state["updates"] == 3
    tenth = [np.sort(gaussian(number, jnp.arange(N) * 1.0), axis=0)[-T // N] for number in range(3)]
    assert_allclose(
        state["threshold"], 0.25 * tenth[0] + 0.25 * tenth[1] + 0.5 * tenth[2], atol=1e-5
    )


def test_a_batch_without_tokens_changes_nothing():
    """It does not count as a batch: the first threshold is that of the first batch with tokens."""
    method = Threshold(decay=0.5, warmup_steps=0)
    state = jax.tree.map(lambda a: a[None], first_state(method))
    for found, threshold, updates in ((-jnp.inf, 0, 0), (2.0, 2, 1), (-jnp.inf, 2, 1), (4.0, 3, 2)):
        stats = SimpleNamespace(records={"kth_largest": jnp.full((1, N), found)})
        state, _ = method.update(Config(experts=EXPERTS, routing=method), state, stats, {})
        assert_array_equal(state["threshold"], np.full((1, N), threshold))
        assert state["updates"] == updates


def test_two_experts_per_token_on_average():
    method = Threshold(decay=0.9, warmup_steps=2)
    _, loads = after(40, method, lambda number: gaussian(number, 0.0), top_k=2)
    assert_allclose(loads[:2], 2 / N, atol=1e-6)
    assert_allclose(loads[20:].mean(axis=0), 2 / N, atol=5e-3)


def test_the_share_is_of_tokens_that_count():
    scores, weights = gaussian(0, 0.0), jnp.arange(T) % 4 == 0
    found = kth_largest(scores, weights.astype(jnp.float32), 1 / N)
    assert_array_equal(found, kth_largest(scores[::4], jnp.ones(T // 4), 1 / N))
    assert_array_equal(found, np.sort(scores[::4], axis=0)[-T // 4 // N])
    assert not np.isfinite(kth_largest(scores, jnp.zeros(T), 1 / N)).any()


def test_weights():
    """They are the sigmoid of the score, or of the score less the threshold; the gradient goes to
    the score.
    """
    state = {"threshold": jnp.full(N, 0.5), "updates": jnp.ones(())}
    scores = gaussian(0, 0.0)

    def weights(scores, kind):
        return routed(Threshold(weights=kind, warmup_steps=0), scores, state).weight.reshape(T, N)

    chosen = np.asarray(scores) > 0.5
    for kind, shift in (("sigmoid", 0.0), ("relative", 0.5)):
        want = np.where(chosen, jax.nn.sigmoid(scores - shift), 0)
        assert_allclose(weights(scores, kind), want, rtol=1e-6)
        slope = jax.grad(lambda s, kind=kind: weights(s, kind).sum())(scores)
        assert_allclose(slope, want * (1 - want), atol=1e-6)

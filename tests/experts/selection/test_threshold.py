"""Expert Threshold routing: the share of tokens that experts take, its causality, its moving
averages.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config import BalanceConfig, Config, ExpertsConfig
from aoe_jax.config.methods import ThresholdConfig
from aoe_jax.experts.parallel import Devices
from aoe_jax.experts.selection.base import Given
from aoe_jax.experts.selection.threshold import Threshold, above_thresholds, kth_largest

N, T = 8, 4000
EXPERTS = ExpertsConfig(kind="router", n_experts=N, top_k=1, selection="threshold")
METHOD = Threshold()


def given(state, training, settings, weights=None):
    weights = jnp.ones(T) if weights is None else weights
    return Given(Devices(), weights, settings, state, {}, None, None, training)


def first_state(settings):
    return METHOD.initial_state(EXPERTS, BalanceConfig(), settings, 4)


def after(steps, settings, scores_of, experts=EXPERTS):
    """`(state, loads [steps, n])` of training on scores."""
    config = Config(experts=experts, threshold=settings)
    state, loads = first_state(settings), []

    @jax.jit
    def step(state, scores):
        choice = METHOD.choose(experts, scores, given(state, True, settings))
        load = (choice.assignment.expert[:, None] == jnp.arange(N)).sum(axis=0) / T
        stats = SimpleNamespace(records=jax.tree.map(lambda a: a[None], choice.records))
        stacked = jax.tree.map(lambda a: a[None], state)
        return jax.tree.map(lambda a: a[0], METHOD.next_state(config, stacked, stats)), load

    for number in range(steps):
        state, load = step(state, scores_of(number))
        loads.append(load)
    return state, np.array(loads)


def gaussian(number, means):
    return jax.random.normal(jax.random.key(number), (T, N)) + means


def test_experts_take_their_share_whatever_their_means():
    """Stationary scores of different means: 1 of 8 tokens each; shifting all scores shifts
    thresholds and nothing else.
    """
    means, settings = jnp.linspace(-2, 3, N), ThresholdConfig(decay=0.9, warmup_steps=0)
    state, loads = after(60, settings, lambda number: gaussian(number, means))
    np.testing.assert_allclose(loads[20:].mean(axis=0), 1 / N, atol=3e-3)
    shifted, same = after(60, settings, lambda number: gaussian(number, means + 5))
    np.testing.assert_allclose(shifted["threshold"] - state["threshold"], 5, atol=1e-4)
    np.testing.assert_allclose(same[20:].mean(axis=0), 1 / N, atol=3e-3)


def test_a_token_decides_by_itself():
    """By thresholds of before: other tokens change nothing in training after the warm-up, nor
    thresholds in evaluation.
    """
    settings = ThresholdConfig(warmup_steps=0)
    state = {"threshold": jnp.linspace(-1, 1, N), "updates": jnp.ones(())}
    scores = gaussian(0, 0.0)
    others = scores.at[1:].set(gaussian(1, 3.0)[1:])
    for training in (True, False):
        choices = [
            METHOD.choose(EXPERTS, s, given(state, training, settings)) for s in (scores, others)
        ]
        first = [(c.assignment.expert[:N], c.assignment.weight[:N]) for c in choices]
        jax.tree.map(np.testing.assert_array_equal, *first)
        assert (choices[0].records is None) == (not training)
    np.testing.assert_array_equal(first[0][0] < N, above_thresholds(scores[0], state["threshold"]))


def test_experts_choose_in_the_warm_up():
    """The k best tokens of each expert, then those above the moving average of the k-th."""
    settings = ThresholdConfig(decay=0.5, warmup_steps=2)
    state, loads = after(3, settings, lambda number: gaussian(number, jnp.arange(N) * 1.0))
    np.testing.assert_allclose(loads[:2], 1 / N, atol=1e-6)
    assert np.abs(loads[2] - 1 / N).max() > 1e-4 and state["updates"] == 3
    tenth = [np.sort(gaussian(number, jnp.arange(N) * 1.0), axis=0)[-T // N] for number in range(3)]
    np.testing.assert_allclose(
        state["threshold"], 0.25 * tenth[0] + 0.25 * tenth[1] + 0.5 * tenth[2], atol=1e-5
    )


def test_a_batch_without_tokens_says_nothing():
    """Not even that there was one: the first threshold is still that of the first batch that has
    tokens.
    """
    settings = ThresholdConfig(decay=0.5, warmup_steps=0)
    state = jax.tree.map(lambda a: a[None], first_state(settings))
    for found, threshold, updates in ((-jnp.inf, 0, 0), (2.0, 2, 1), (-jnp.inf, 2, 1), (4.0, 3, 2)):
        stats = SimpleNamespace(records={"kth_largest": jnp.full((1, N), found)})
        state = METHOD.next_state(Config(experts=EXPERTS, threshold=settings), state, stats)
        np.testing.assert_array_equal(state["threshold"], np.full((1, N), threshold))
        assert state["updates"] == updates


def test_two_experts_per_token_on_average():
    experts = dataclasses.replace(EXPERTS, top_k=2)
    _, loads = after(
        40,
        ThresholdConfig(decay=0.9, warmup_steps=2),
        lambda number: gaussian(number, 0.0),
        experts,
    )
    np.testing.assert_allclose(loads[:2], 2 / N, atol=1e-6)
    np.testing.assert_allclose(loads[20:].mean(axis=0), 2 / N, atol=5e-3)


def test_the_share_is_of_tokens_that_count():
    scores, weights = gaussian(0, 0.0), jnp.arange(T) % 4 == 0
    found = kth_largest(scores, weights.astype(jnp.float32), 1 / N)
    np.testing.assert_array_equal(found, kth_largest(scores[::4], jnp.ones(T // 4), 1 / N))
    np.testing.assert_array_equal(found, np.sort(scores[::4], axis=0)[-T // 4 // N])
    assert not np.isfinite(kth_largest(scores, jnp.zeros(T), 1 / N)).any()


def test_weights():
    """The sigmoid of the score, or of what it has above the threshold; the gradient is that of the
    score.
    """
    state = {"threshold": jnp.full(N, 0.5), "updates": jnp.ones(())}
    scores = gaussian(0, 0.0)

    def weights(scores, kind):
        settings = ThresholdConfig(weights=kind, warmup_steps=0)
        return METHOD.choose(
            EXPERTS, scores, given(state, True, settings)
        ).assignment.weight.reshape(T, N)

    chosen = np.asarray(scores) > 0.5
    for kind, shift in (("sigmoid", 0.0), ("relative", 0.5)):
        want = np.where(chosen, jax.nn.sigmoid(scores - shift), 0)
        np.testing.assert_allclose(weights(scores, kind), want, rtol=1e-6)
        slope = jax.grad(lambda s, kind=kind: weights(s, kind).sum())(scores)
        np.testing.assert_allclose(slope, want * (1 - want), atol=1e-6)

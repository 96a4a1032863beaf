"""Losses and diagnostics on loads whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.moe import load_balance
from aoe_jax.moe.load_balance import balance_loss, load_entropy, load_spread
from aoe_jax.moe.routing import top_k
from tests.arrays import assert_close, assert_finite, normal
from tests.moe.contexts import expert_choice, layer_stats, sequence_balance_loss, top_p


def z_loss(scores, token_weights):
    return load_balance.z_loss(scores, token_weights, lambda sums: sums)


def test_known_loads():
    """Perfect balance gives a loss of K, and collapse of n."""
    assert_allclose(balance_loss(jnp.full(8, 2 / 8), jnp.full(8, 1 / 8)), 2)
    one = jnp.zeros(8).at[3].set(1.0)
    assert_allclose(balance_loss(one, one), 8)
    assert_allclose(load_entropy(jnp.full((2, 8), 0.25)), np.log(8), atol=1e-6)
    assert_allclose(load_entropy(jnp.zeros(8).at[2].set(2.0)), 0, atol=1e-6)
    assert_allclose(load_spread(jnp.array([[0.5, 1.0], [0.2, 0.9]])), 1.2, atol=1e-6)


def test_statistics_against_numpy():
    scores = normal(0, (50, 6))
    stats = layer_stats(scores, scores, top_k(scores, 2), jnp.ones(50))
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    chosen = np.argsort(-np.asarray(scores), axis=1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=6) / 50
    assert_allclose(stats.load, load, atol=1e-6)
    assert_allclose(stats.mean_probability, p.mean(axis=0), atol=1e-6)
    assert_allclose(stats.confidence_entropy, -(p * np.log(p)).sum(axis=1).mean(), atol=1e-6)
    assert_allclose(stats.mean_score, np.asarray(scores).mean(axis=0), atol=1e-6)
    assert_allclose(stats.score_spread, np.asarray(scores).std(axis=1).mean(), atol=1e-6)


@pytest.mark.parametrize(
    "select",
    [lambda s, w: top_k(s, 2), lambda s, w: top_p(s, 0.6), lambda s, w: expert_choice(s, 2.5, w)],
)
@pytest.mark.parametrize("stride", [1, 4])
def test_padding_counts_in_nothing(select, stride):
    scores, ones = normal(0, (21, 6)), jnp.ones(12)
    real, weights = scores[:12], jnp.concatenate([ones, jnp.zeros(9)])
    got = layer_stats(scores, scores[::stride], select(scores, weights), weights, stride)
    want = layer_stats(real, real[::stride], select(real, ones), ones, stride)
    assert_close(got, want, 1e-6)
    nothing = 0 * weights
    assert_finite(layer_stats(scores, scores[::stride], select(scores, nothing), nothing, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_sequences_by_themselves(stride):
    """Padding, sequences of padding and unused slots do not count."""
    scores = normal(0, (4, 8, 5))
    weights = jnp.ones((4, 8)).at[1, 6:].set(0).at[3].set(0)

    def select(scores):
        return top_p(scores, 0.5)

    def by_loop(scores):
        losses = []
        for b, length in ((0, 8), (1, 6), (2, 8)):
            of_all, sampled = scores[b, :length], scores[b, :length:stride]
            stats = layer_stats(of_all, sampled, select(of_all), jnp.ones(length), stride)
            losses.append(balance_loss(stats.load, stats.mean_probability))
        return sum(losses) / 3

    def at_once(scores):
        flat = scores.reshape(32, 5)
        return sequence_balance_loss(flat[::stride], select(flat), weights.reshape(32), 4, stride)

    got, want = (jax.jit(jax.value_and_grad(f))(scores) for f in (at_once, by_loop))
    assert_close(got, want, 1e-6)


def test_z_loss():
    """The square of log n for equal logits of 0; padding does not count."""
    assert_allclose(z_loss(jnp.zeros((3, 8)), jnp.ones(3)), np.log(8) ** 2, rtol=1e-6)
    scores = normal(0, (20, 6))
    want = np.mean(np.log(np.exp(np.asarray(scores[:15])).sum(axis=1)) ** 2)
    assert_allclose(z_loss(scores, jnp.ones(20).at[15:].set(0)), want, rtol=1e-5)
    assert z_loss(scores, jnp.zeros(20)) == 0
    assert float(z_loss(scores + 1, jnp.ones(20))) > float(z_loss(scores, jnp.ones(20)))

"""Losses and diagnostics on loads whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from aoe_jax.moe import balance
from aoe_jax.moe.balance import balance_loss, updated_bias
from aoe_jax.moe.routing import top_k
from aoe_jax.training.load_statistics import load_entropy, load_spread
from tests.arrays import assert_close, normal
from tests.moe.contexts import expert_choice, layer_stats, sequence_balance_loss, top_p


def z_loss(scores, token_weights):
    return balance.z_loss(scores, token_weights, lambda sums: sums)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_perfect_balance_gives_the_experts_per_token(k):
    assert_allclose(balance_loss(jnp.full(8, k / 8), jnp.full(8, 1 / 8)), k)


def test_collapse_gives_n():
    one = jnp.zeros(8).at[3].set(1.0)
    assert_allclose(balance_loss(one, one), 8)


def test_entropies():
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


@pytest.mark.parametrize("n_tokens", [20, 21, 23])
def test_balance_losses_from_some_of_the_tokens(n_tokens):
    """Probability and entropy are those of every fourth token; load and scores are those of all."""
    scores = normal(0, (n_tokens, 6))
    weights = jnp.ones(n_tokens).at[8:].set(0)
    got = layer_stats(scores, scores[::4], top_k(scores, 2), weights, stride=4)
    every = layer_stats(scores, scores, top_k(scores, 2), weights)
    some = layer_stats(scores[::4], scores[::4], top_k(scores[::4], 2), weights[::4])
    for name in ("load", "mean_score", "score_spread"):
        assert_allclose(getattr(got, name), getattr(every, name), atol=1e-6)
    for name in ("mean_probability", "confidence_entropy"):
        assert_allclose(getattr(got, name), getattr(some, name), atol=1e-6)


def test_bias_moves_against_the_load():
    bias, load = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.25, 0.75, 0.5]])
    got = updated_bias(bias, load, jnp.array([0.5]), 0.1)
    assert_allclose(got, [[0.05, 0.95, 2.0]], atol=1e-6)


@pytest.mark.parametrize(
    "select",
    [lambda s, w: top_k(s, 2), lambda s, w: top_p(s, 0.6), lambda s, w: expert_choice(s, 2.5, w)],
)
def test_padding_counts_in_nothing(select):
    scores = normal(0, (20, 6))
    weights = jnp.concatenate([jnp.ones(12), jnp.zeros(8)])
    got = layer_stats(scores, scores, select(scores, weights), weights)
    want = layer_stats(scores[:12], scores[:12], select(scores[:12], jnp.ones(12)), jnp.ones(12))
    assert_close(got, want, 1e-6)


def of_batch(scores, assignment, weights):
    stats = layer_stats(scores, scores, assignment, weights)
    return balance_loss(stats.load, stats.mean_probability)


def test_sequences_that_are_each_for_one_expert():
    """Two of them, wholly for an expert each: 2 by themselves, 1 together."""
    scores = jnp.repeat(50 * jnp.eye(2), 6, axis=0)
    assignment, weights = top_k(scores, 1), jnp.ones(12)
    assert_allclose(sequence_balance_loss(scores, assignment, weights, 2), 2, rtol=1e-6)
    assert_allclose(of_batch(scores, assignment, weights), 1, rtol=1e-6)
    assert_allclose(sequence_balance_loss(scores, assignment, weights, 1), 1, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_sequences_by_themselves(stride):
    """Value and gradient; padding counts in nothing, nor does a sequence of it, nor an unused
    slot.
    """
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

    for got, want in zip(
        *(jax.jit(jax.value_and_grad(f))(scores) for f in (at_once, by_loop)), strict=True
    ):
        assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_z_loss():
    """The square of log n for equal logits of 0; padding does not count."""
    assert_allclose(z_loss(jnp.zeros((3, 8)), jnp.ones(3)), np.log(8) ** 2, rtol=1e-6)
    scores = normal(0, (20, 6))
    want = np.mean(np.log(np.exp(np.asarray(scores[:15])).sum(axis=1)) ** 2)
    assert_allclose(z_loss(scores, jnp.ones(20).at[15:].set(0)), want, rtol=1e-5)
    assert float(z_loss(scores + 1, jnp.ones(20))) > float(z_loss(scores, jnp.ones(20)))


def test_load_carries_no_gradient_and_probability_does():
    scores = normal(0, (20, 6))

    def stats(scores):
        return layer_stats(scores, scores, expert_choice(scores, 2.0), jnp.ones(20))

    assert (jax.grad(lambda s: stats(s).load[0])(scores) == 0).all()
    gradient = jax.grad(lambda s: balance_loss(stats(s).load, stats(s).mean_probability))(scores)
    load = stats(scores).load
    want = jax.grad(lambda s: 6 * jnp.sum(load * jax.nn.softmax(s).mean(axis=0)))(scores)
    assert_allclose(gradient, want, atol=1e-7)

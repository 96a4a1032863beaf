"""GShard's two experts: their draw, their weights, and the balance loss."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from aoe_jax.config.experts import BalanceConfig
from aoe_jax.methods.gshard import GShard, top_two
from aoe_jax.moe import load_balance
from aoe_jax.moe.routing import top_k
from aoe_jax.moe.scoring import Scores
from tests.arrays import assert_equal, normal
from tests.moe.contexts import context


@jax.jit
def loss_of(scores, token_weights=None):
    """The loss of one layer in training."""
    ctx = context(scores, token_weights, training=True, rng=jax.random.key(0))
    routing = GShard()(scores, {}, ctx)
    stats = load_balance.statistics(Scores(scores, scores), routing, BalanceConfig(0.0), ctx)
    stats = jax.tree.map(lambda a: a[None], stats)
    weight, value = GShard().losses(stats, {}, {})["first_choice_loss"]
    assert weight == GShard.aux_weight
    return value


def test_evaluation_takes_both_as_top_2_does():
    scores = normal(0, (50, 6))
    for found in (top_two(scores), GShard()(scores, {}, context(scores))._replace(shares=None)):
        assert_equal(found, top_k(scores, 2))


def test_the_second_is_drawn_with_twice_its_weight():
    """A weight does not depend on the draw of the other; both have the gradient of the softmax."""
    scores, key = normal(0, (50, 6)), jax.random.key(3)
    uniform = jax.random.uniform(key, (50,))
    best, first_two = jax.lax.top_k(scores, 2)
    is_drawn = uniform < 2 * jax.nn.softmax(best)[:, 1]
    assert 10 < is_drawn.sum() < 50
    in_training = GShard()(scores, {}, context(scores, training=True, rng=key))
    assert_equal(top_two(scores, uniform), in_training._replace(shares=None))
    expert = jnp.stack([first_two[:, 0], jnp.where(is_drawn, first_two[:, 1], 6)], axis=1)
    assert_equal(in_training.expert, expert.reshape(-1))
    cotangent = normal(1, (50, 2))

    def weights(scores):
        return jax.nn.softmax(jax.lax.top_k(scores, 2)[0]) * jnp.where(expert < 6, 1, 0)

    def loss(weights):
        return lambda scores: (weights(scores).reshape(50, 2) * cotangent).sum()

    assert_allclose(in_training.weight, weights(scores).reshape(-1), rtol=1e-5)
    got, want = (
        jax.grad(loss(function))(scores)
        for function in (lambda s: top_two(s, uniform).weight, weights)
    )
    assert_allclose(got, want, atol=1e-6)


def test_loss():
    """It is 1 in perfect balance and n in collapse, the scale of Switch; the paper's is 1 / n^2 of
    that. Its gradient reaches the gates only; padding does not count.
    """
    assert_allclose(loss_of(100 * jnp.eye(4)), 1, rtol=1e-5)
    assert_allclose(loss_of(jnp.zeros((8, 4)).at[:, 2].set(100)), 4, rtol=1e-5)
    scores = normal(0, (30, 4))
    load = jnp.bincount(scores.argmax(axis=1), length=4) / 30

    def papers(scores):
        return jnp.mean(load * jax.nn.softmax(scores).mean(axis=0))

    assert_allclose(loss_of(scores), 4**2 * papers(scores), rtol=1e-5)
    assert_allclose(jax.grad(loss_of)(scores), 4**2 * jax.grad(papers)(scores), atol=1e-7)
    weights = np.where(np.arange(30) < 20, 1.0, 0)
    assert_allclose(loss_of(scores, weights), loss_of(scores[:20]), rtol=1e-5)

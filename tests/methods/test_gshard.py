"""GShard's two experts: their draw, their weights, and its loss on known loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.balance import BalanceConfig
from aoe_jax.methods.gshard import GShard, top_two
from aoe_jax.moe import balance
from aoe_jax.moe.routing import top_k
from aoe_jax.moe.scoring import Scores
from tests.arrays import assert_equal, normal
from tests.config.refused import check_refused
from tests.moe.contexts import context


def routed(scores, key=None):
    """The `Routing` in training with a key, without one in evaluation."""
    ctx = context(scores, training=key is not None, rng=key)
    return GShard()(scores, {}, ctx)


@jax.jit
def loss_of(scores, token_weights=None):
    """The loss of one layer in training."""
    ctx = context(scores, token_weights, training=True, rng=jax.random.key(0))
    routing = GShard()(scores, {}, ctx)
    stats = balance.statistics(Scores(scores, scores), routing, BalanceConfig(0.0), ctx)
    stats = jax.tree.map(lambda a: a[None], stats)
    weight, value = GShard().losses(stats, {}, {})["first_choice_loss"]
    assert weight == GShard.aux_weight
    return value


def test_evaluation_takes_both_as_top_2_does():
    scores = normal(0, (50, 6))
    for found in (top_two(scores), routed(scores)._replace(shares=None)):
        assert_equal(found, top_k(scores, 2))


@pytest.mark.slow
def test_the_second_is_drawn_with_twice_its_weight():
    """The first is always chosen; no weight depends on the draw."""
    row = jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.3 / 0.7 * 0.1], [0.4, 0.1, 0.4, 0.1]]))
    n = 20_000
    found = routed(jnp.repeat(row, n, axis=0), jax.random.key(3))
    expert, weight = found.expert.reshape(2, n, 2), found.weight.reshape(2, n, 2)
    assert_array_equal(expert[..., 0], np.repeat([[1], [0]], n, axis=1))
    w2 = np.array([0.1 / 0.6, 0.5])
    is_drawn = expert[..., 1] < 4
    for share, w, draws, weights in zip(
        np.mean(is_drawn, axis=1), w2, is_drawn, weight, strict=True
    ):
        assert abs(share - min(1, 2 * w)) <= 3 * np.sqrt(2 * w * (1 - min(1, 2 * w)) / n) + 1e-9
        assert_allclose(weights[:, 0], 1 - w, rtol=1e-5)
        assert_allclose(weights[:, 1], np.where(draws, w, 0), rtol=1e-5)
    assert is_drawn[1].all() and 0 < is_drawn[0].sum() < n


@pytest.mark.parametrize("which", [0, 1])
def test_weights_have_gradients(which):
    """The weight of the second expert has a gradient where that expert is drawn."""
    scores = normal(0, (20, 5))
    uniform = jax.random.uniform(jax.random.key(1), (20,))
    is_drawn = uniform < 2 * jax.nn.softmax(jax.lax.top_k(scores, 2)[0])[:, 1]
    assert 0 < is_drawn.sum() < 20
    counts = is_drawn if which else jnp.ones(20)
    got = jax.grad(lambda s: top_two(s, uniform).weight[which::2].sum())(scores)
    want = jax.grad(lambda s: (counts * jax.nn.softmax(jax.lax.top_k(s, 2)[0])[:, which]).sum())(
        scores
    )
    assert_allclose(got, want, atol=1e-6)


def test_loss_on_known_loads():
    """It is 1 in perfect balance and n in collapse, the scale of Switch; the paper's is 1 / n^2 of
    that.
    """
    assert_allclose(loss_of(100 * jnp.eye(4)), 1, rtol=1e-5)
    assert_allclose(loss_of(jnp.zeros((8, 4)).at[:, 2].set(100)), 4, rtol=1e-5)
    scores = normal(0, (30, 4))
    gate = np.asarray(jax.nn.softmax(scores))
    papers = np.mean(np.bincount(gate.argmax(axis=1), minlength=4) / 30 * gate.mean(axis=0))
    assert_allclose(loss_of(scores), 4**2 * papers, rtol=1e-5)


def test_gradients_reach_gates_only_and_padding_does_not_count():
    scores = normal(0, (30, 4))
    weights = jnp.ones(30).at[20:].set(0)
    assert_allclose(loss_of(scores, weights), loss_of(scores[:20]), rtol=1e-5)
    load = jnp.bincount(scores.argmax(axis=1), length=4) / 30
    want = jax.grad(lambda s: 4 * (load * jax.nn.softmax(s).mean(axis=0)).sum())(scores)
    assert_allclose(jax.grad(loss_of)(scores), want, atol=1e-7)


REFUSED = """
experts.top_k=3; routing.name=gshard => routing.name='gshard' takes two experts; set 2
balance.aux_weight=0.01; routing.name=gshard => is the balance loss of both choices, and
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_what_is_refused(case):
    check_refused(case)

"""Routers on scores whose outcome is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods import ROUTERS, find_method
from aoe_jax.methods.expert_choice import expert_capacity
from aoe_jax.methods.sparsemixer import sparsemixer_weights
from aoe_jax.moe.layer import ExpertsLayer
from tests.arrays import normal
from tests.moe.contexts import top_p

pytestmark = pytest.mark.smoke


def dense_weights(assignment, n_tokens, n_experts):
    """Weights `[T, n]`; also checks that unused slots weigh nothing."""
    weights = np.zeros((n_tokens, n_experts + 1))
    np.add.at(
        weights,
        (np.asarray(assignment.token), np.asarray(assignment.expert)),
        np.asarray(assignment.weight),
    )
    assert_array_equal(weights[:, n_experts], 0)
    return weights[:, :n_experts]


@pytest.mark.parametrize(("threshold", "experts"), [(0.4, 7), (0.5, 9), (0.01, 1)])
def test_top_p_on_uniform_scores(threshold, experts):
    """The sum must exceed the threshold: 9 of 16 experts at 0.5, not 8."""
    weights = dense_weights(top_p(jnp.zeros((3, 16)), threshold), 3, 16)
    assert_array_equal((weights > 0).sum(axis=1), experts)
    assert_allclose(weights[weights > 0], 1 / 16)


def test_sparsemixer_weighs_among_the_near():
    """The distance is relative to the scores; two zeros are near; with jitter 0 weights are 1."""
    scores = jnp.array([[2, 1.99, 0, 1], [0, 0, -1, -1], [-1, -1.01, -9, -9]])
    expert = jnp.tile(jnp.arange(2), (3, 1))
    near = 1 / (1 + np.exp(-0.01))
    assert_allclose(
        sparsemixer_weights(scores, expert, 0.01), [[near, 1], [0.5, 1], [near, 1]], rtol=1e-6
    )
    assert_allclose(
        sparsemixer_weights(scores, expert, 0.001), [[1, 1], [0.5, 1], [1, 1]], rtol=1e-6
    )
    assert_allclose(sparsemixer_weights(scores[:1], expert[:1], 0.0), [[1, 1]], rtol=1e-6)


def test_capacity_rounds_up():
    assert [expert_capacity(t, 8, 2.0) for t in (8, 9, 40, 3, 1)] == [2, 3, 10, 1, 1]
    assert expert_capacity(256, 8, 2.5) == 80 and expert_capacity(5, 4, 4.0) == 5


EXPERTS = ExpertsConfig(kind="router", n_experts=8, top_k=2, d_ffn=8)
FIXED = [name for name in ROUTERS if find_method(name)().choice(EXPERTS).is_fixed]


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_choice_leaves_no_slot_unused(name):
    """Dispatch and grouped products rely on this, also for padding."""
    layer = ExpertsLayer(
        EXPERTS,
        find_method(name)(),
        training=name != "sparsemixer",  # which cannot be trained
        observe=lambda scores, routing, weights, ctx: routing.expert,
    )
    x, token_weights = normal(0, (2, 16, 8)), jnp.ones((2, 16))
    args = x, token_weights.at[1, 8:].set(0)
    params = layer.init(jax.random.key(1), *args)
    _, stats = layer.apply(params, *args, rngs={"experts": jax.random.key(2)})
    expert = stats.records["observed"]
    assert expert.shape == (2 * 32,) and (expert >= 0).all() and (expert < 8).all()

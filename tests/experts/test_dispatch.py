"""Tokens to rows in expert order and back, for token-major and arbitrary slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.experts.dispatch import combine, dispatch, plan_rows, row_values, slot_values, take_activations
from aoe_jax.experts.selection import expert_choice, top_k, top_p

SELECTIONS = {
    "top_k": lambda s: top_k(s, 2),
    "top_p": lambda s: top_p(s, 0.5),
    "expert_choice": lambda s: expert_choice(s, 2.0),
}


@pytest.fixture(params=SELECTIONS)
def assignment(request):
    return SELECTIONS[request.param](jax.random.normal(jax.random.key(0), (30, 5)))


def test_rows_lie_in_expert_order(assignment):
    plan = plan_rows(assignment, 5)
    expert = np.asarray(assignment.expert)[plan.order]
    assert (np.diff(expert) >= 0).all()
    np.testing.assert_array_equal(plan.group_sizes, np.bincount(expert, minlength=6)[:5])
    np.testing.assert_array_equal(plan.order[plan.inverse], np.arange(len(expert)))
    for e in range(5):  # stable: tokens of an expert keep their order
        slots = np.asarray(plan.order)[expert == e]
        assert (np.diff(slots) > 0).all()


def test_round_trip_and_gradients(assignment):
    """Dispatch, weigh and combine multiplies each token by the sum of its weights; so says the gradient."""
    x = jax.random.normal(jax.random.key(1), (30, 7))
    cotangent = jax.random.normal(jax.random.key(2), (30, 7))
    plan = plan_rows(assignment, 5)
    total = jnp.zeros(30).at[assignment.token].add(assignment.weight)

    def there_and_back(x, weight):
        a = assignment._replace(weight=weight)
        return combine(dispatch(x, a, plan) * row_values(a.weight, plan)[:, None], a, plan, 30)

    got, pull_back = jax.vjp(there_and_back, x, assignment.weight)
    np.testing.assert_allclose(got, x * total[:, None], atol=1e-5)
    d_x, d_weight = pull_back(cotangent)
    np.testing.assert_allclose(d_x, cotangent * total[:, None], atol=1e-5)
    np.testing.assert_allclose(d_weight, (x * cotangent).sum(axis=1)[assignment.token], atol=1e-5)


def test_values_by_slot_and_by_row(assignment):
    plan = plan_rows(assignment, 5)
    values = jnp.arange(assignment.expert.shape[0], dtype=jnp.float32)
    by_row = row_values(values, plan)
    np.testing.assert_array_equal(by_row, plan.order)
    np.testing.assert_array_equal(slot_values(by_row, plan), values)


def test_activations_follow_their_rows(assignment):
    cache = jax.random.normal(jax.random.key(3), (30, 5, 4))
    plan = plan_rows(assignment, 5)
    rows = take_activations(cache, assignment, plan)
    expert = np.asarray(assignment.expert)[plan.order]
    used = expert < 5
    np.testing.assert_array_equal(rows[used], np.asarray(cache)[np.asarray(plan.token)[used], expert[used]])
    np.testing.assert_array_equal(rows[~used], 0)

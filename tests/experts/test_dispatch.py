"""Tokens to rows by expert and back, for token-major and arbitrary slots, in expert order and at
places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.experts import dispatch as station
from aoe_jax.experts.dispatch import (
    combine,
    dispatch,
    plan_rows,
    row_values,
    slot_values,
    take_activations,
)
from aoe_jax.experts.permute import NOWHERE
from aoe_jax.experts.selection.expert_choice import expert_choice
from aoe_jax.experts.selection.top_k import top_k
from aoe_jax.experts.selection.top_p import top_p

SELECTIONS = {
    "top_k": lambda s: top_k(s, 2),
    "top_p": lambda s: top_p(s, 0.5),
    "expert_choice": lambda s: expert_choice(s, 2.0),
}


@pytest.fixture(params=SELECTIONS)
def assignment(request):
    return SELECTIONS[request.param](jax.random.normal(jax.random.key(0), (30, 5)))


@pytest.fixture(params=["in expert order", "at places"])
def plan(request, assignment, monkeypatch):
    if request.param == "in expert order":
        monkeypatch.setattr(station, "place_rows", lambda group_sizes, m: None)
    return plan_rows(assignment, 5)


def read(values, index, fill):
    """`values[index]`, and `fill` where the index is out of range."""
    return np.asarray(jnp.asarray(values).at[index].get(mode="fill", fill_value=fill))


def test_rows_lie_in_expert_order(assignment, monkeypatch):
    monkeypatch.setattr(station, "place_rows", lambda group_sizes, m: None)
    plan = plan_rows(assignment, 5)
    expert = np.asarray(assignment.expert)[plan.order]
    assert (np.diff(expert) >= 0).all()
    np.testing.assert_array_equal(plan.groups, np.bincount(expert, minlength=6)[:5])
    np.testing.assert_array_equal(plan.order[plan.inverse], np.arange(len(expert)))
    for e in range(5):  # stable: tokens of an expert keep their order
        slots = np.asarray(plan.order)[expert == e]
        assert (np.diff(slots) > 0).all()


def test_every_used_slot_has_one_place(assignment):
    plan = plan_rows(assignment, 5)
    expert = np.asarray(assignment.expert)
    placed = np.asarray(plan.order) != NOWHERE
    np.testing.assert_array_equal(np.sort(plan.order[placed]), np.flatnonzero(expert < 5))
    np.testing.assert_array_equal(plan.inverse[plan.order[placed]], np.flatnonzero(placed))
    np.testing.assert_array_equal(plan.inverse[expert == 5], NOWHERE)
    np.testing.assert_array_equal(plan.token, read(assignment.token, plan.order, NOWHERE))


def test_round_trip_and_gradients(assignment, plan):
    """Dispatch, weigh and combine multiplies each token by the sum of its weights; so says the
    gradient.
    """
    x = jax.random.normal(jax.random.key(1), (30, 7))
    cotangent = jax.random.normal(jax.random.key(2), (30, 7))
    total = jnp.zeros(30).at[assignment.token].add(assignment.weight)

    def there_and_back(x, weight):
        a = assignment._replace(weight=weight)
        return combine(dispatch(x, a, plan) * row_values(a.weight, plan)[:, None], a, plan, 30)

    got, pull_back = jax.vjp(there_and_back, x, assignment.weight)
    np.testing.assert_allclose(got, x * total[:, None], atol=1e-5)
    d_x, d_weight = pull_back(cotangent)
    np.testing.assert_allclose(d_x, cotangent * total[:, None], atol=1e-5)
    used = assignment.expert < 5  # the weights of others are constants
    np.testing.assert_allclose(
        d_weight[used], (x * cotangent).sum(axis=1)[assignment.token][used], atol=1e-5
    )


def test_values_by_slot_and_by_row(assignment, plan):
    values = jnp.arange(assignment.expert.shape[0], dtype=jnp.float32)
    by_row = row_values(values, plan)
    np.testing.assert_array_equal(by_row, read(values, plan.order, 0))
    np.testing.assert_array_equal(
        slot_values(by_row, plan), jnp.where(plan.inverse == NOWHERE, 0, values)
    )


def test_activations_follow_their_rows(assignment, plan):
    cache = jax.random.normal(jax.random.key(3), (30, 5, 4))
    rows = take_activations(cache, assignment, plan)
    expert = read(assignment.expert, plan.order, 5)
    used = expert < 5
    np.testing.assert_array_equal(
        rows[used], np.asarray(cache)[np.asarray(plan.token)[used], expert[used]]
    )
    np.testing.assert_array_equal(rows[~used], 0)


def test_more_slots_than_gathers_are_spelled_out_for():
    """As under top-p, where every expert is a slot."""
    rows, n_tokens, n_slots = (
        jax.random.normal(jax.random.key(0), (90, 7)),
        5,
        station.MAX_GATHERS + 2,
    )
    inverse = jax.random.permutation(jax.random.key(1), 90)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = station._sum_slots(rows.astype(dtype), inverse, n_slots)
        want = (
            rows.astype(dtype)
            .astype(jnp.float32)[inverse]
            .reshape(n_tokens, n_slots, 7)
            .sum(axis=1)
        )
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), want, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
        )

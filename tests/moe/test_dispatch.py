"""Tokens to rows by expert and back, for token-major and arbitrary slots, in expert order and
in the layout of a backend.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from aoe_jax.moe import dispatch as module
from aoe_jax.moe.dispatch import Local, lay_out, take_code
from aoe_jax.moe.grouped_matmul.groups import NOWHERE
from aoe_jax.moe.parallel.collectives import Devices
from aoe_jax.moe.routing import top_k
from tests.arrays import normal
from tests.moe.contexts import expert_choice, top_p

LOCAL = Local(Devices(), 5)
ROUTERS = {
    "top_k": lambda s: top_k(s, 2),
    "top_p": lambda s: top_p(s, 0.5),
    "expert_choice": lambda s: expert_choice(s, 2.0),
}


@pytest.fixture(params=ROUTERS)
def routing(request):
    return ROUTERS[request.param](normal(0, (30, 5)))


@pytest.fixture(params=["in expert order", "in the layout of a backend"])
def rows(request, routing, monkeypatch):
    if request.param == "in expert order":
        monkeypatch.setattr(module, "row_layout", lambda *args: None)
    return lay_out(routing, 5, all_used=bool((routing.expert < 5).all()))


def read(values, index, fill):
    """`values[index]`, and `fill` where the index is out of range."""
    return np.asarray(jnp.asarray(values).at[index].get(mode="fill", fill_value=fill))


def test_rows_lie_in_expert_order(routing, monkeypatch):
    monkeypatch.setattr(module, "row_layout", lambda *args: None)
    rows = lay_out(routing, 5)
    expert = np.asarray(routing.expert)[rows.slot]
    assert (np.diff(expert) >= 0).all()
    assert_array_equal(rows.groups, np.bincount(expert, minlength=6)[:5])
    assert_array_equal(rows.slot[rows.row], np.arange(len(expert)))
    for e in range(5):  # stable: tokens of an expert keep their order
        slots = np.asarray(rows.slot)[expert == e]
        assert (np.diff(slots) > 0).all()


def test_every_used_slot_has_one_place(routing):
    rows = lay_out(routing, 5)
    expert = np.asarray(routing.expert)
    placed = np.asarray(rows.slot) != NOWHERE
    assert_array_equal(np.sort(rows.slot[placed]), np.flatnonzero(expert < 5))
    assert_array_equal(rows.row[rows.slot[placed]], np.flatnonzero(placed))
    assert_array_equal(rows.row[expert == 5], NOWHERE)
    assert_array_equal(rows.token, read(routing.token, rows.slot, NOWHERE))


def test_round_trip_and_gradients(routing, rows):
    """Dispatch, weigh and combine multiplies each token by the sum of its weights; so says the
    gradient.
    """
    x = normal(1, (30, 7))
    cotangent = normal(2, (30, 7))
    total = jnp.zeros(30).at[routing.token].add(routing.weight)

    def there_and_back(x, weight):
        round = (routing, rows)
        weighted = LOCAL.dispatch(x, round)[0] * LOCAL.row_values(weight, round)[:, None]
        return LOCAL.combine(weighted, round, 30)

    got, pull_back = jax.vjp(there_and_back, x, routing.weight)
    assert_allclose(got, x * total[:, None], atol=1e-5)
    d_x, d_weight = pull_back(cotangent)
    assert_allclose(d_x, cotangent * total[:, None], atol=1e-5)
    used = routing.expert < 5  # the weights of others are constants
    assert_allclose(d_weight[used], (x * cotangent).sum(axis=1)[routing.token][used], atol=1e-5)


def test_values_by_slot_and_by_row(routing, rows):
    round = (routing, rows)
    values = jnp.arange(routing.expert.shape[0], dtype=jnp.float32)
    by_row = LOCAL.row_values(values, round)
    assert_array_equal(by_row, read(values, rows.slot, 0))
    by_slot = LOCAL.slot_values(by_row, round, len(values))
    assert_array_equal(by_slot, jnp.where(rows.row == NOWHERE, 0, values))
    codes, expert = normal(3, (30, 5, 4)), read(routing.expert, rows.slot, 5)
    taken, used = take_code(codes, round), expert < 5
    assert_array_equal(taken[used], np.asarray(codes)[np.asarray(rows.token)[used], expert[used]])
    assert_array_equal(taken[~used], 0)


def test_more_slots_than_gathers_are_spelled_out_for():
    """As under top-p, where every expert is a slot."""
    values, n_tokens, n_slots = normal(0, (90, 7)), 5, module.MAX_GATHERS + 2
    inverse = jax.random.permutation(jax.random.key(1), 90)
    layout = module.Rows(None, inverse, None, None)
    for dtype, rtol in (("float32", 1e-5), ("bfloat16", 1e-2)):
        rows = values.astype(dtype)
        got = module._sum_slots(rows, layout, n_slots)
        want = rows.astype("float32")[inverse].reshape(n_tokens, n_slots, 7).sum(axis=1)
        assert got.dtype == dtype
        assert_allclose(got.astype("float32"), want, rtol=rtol, atol=1e-5)

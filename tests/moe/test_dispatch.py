"""Tokens to rows by expert and back, for token-major and arbitrary slots, in expert order and
in the layout of a backend.
"""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from aoe_jax.moe import dispatch as module
from aoe_jax.moe import grouped_matmul
from aoe_jax.moe.collectives import Devices
from aoe_jax.moe.dispatch import Local, lay_out
from aoe_jax.moe.grouped_matmul import RowLayout
from aoe_jax.moe.routing import top_k
from tests.arrays import normal
from tests.moe.contexts import expert_choice, top_p

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


def test_the_layout_is_that_of_the_backend_for_the_dtype(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "_default_backend", lambda device: "mosaic_gpu")
    routing = ROUTERS["top_k"](normal(0, (30, 5)))
    of_dtype = {dtype: lay_out(routing, 5, dtype=dtype).groups for dtype in ("bfloat16", "float32")}
    assert [isinstance(g, RowLayout) for g in of_dtype.values()] == [False, True]


def test_round_trip_and_gradients(routing, rows):
    """Dispatch, weigh and combine multiply each token by the sum of its weights."""
    x = normal(1, (30, 7))
    cotangent = normal(2, (30, 7))
    total = jnp.zeros(30).at[routing.token].add(routing.weight)

    local = Local(Devices(), 5, routing.slots_per_token)

    def there_and_back(x, weight):
        round = (routing, rows)
        weighted = local.dispatch(x, round)[0] * local.row_values(weight, round)[:, None]
        return local.combine(weighted, round, 30)

    got, pull_back = jax.vjp(there_and_back, x, routing.weight)
    assert_allclose(got, x * total[:, None], atol=1e-5)
    d_x, d_weight = pull_back(cotangent)
    assert_allclose(d_x, cotangent * total[:, None], atol=1e-5)
    used = routing.expert < 5  # the weights of others are constants
    assert_allclose(d_weight[used], (x * cotangent).sum(axis=1)[routing.token][used], atol=1e-5)


def test_more_slots_than_gathers_are_spelled_out_for():
    """Top-p has such routings, with a slot for every expert."""
    values, n_tokens, n_slots = normal(0, (90, 7)), 5, module.MAX_GATHERS + 2
    inverse = jax.random.permutation(jax.random.key(1), 90)
    layout = module.Rows(None, inverse, None, None)
    for dtype, rtol in (("float32", 1e-5), ("bfloat16", 1e-2)):
        rows = values.astype(dtype)
        got = module._sum_slots(rows, layout, n_slots)
        want = rows.astype("float32")[inverse].reshape(n_tokens, n_slots, 7).sum(axis=1)
        assert got.dtype == dtype
        assert_allclose(got.astype("float32"), want, rtol=rtol, atol=1e-5)

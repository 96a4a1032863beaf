"""The layout that `benchmarks.slots` times is the same choice."""

import jax
import numpy as np

from aoe_jax.moe.routing import TopK
from benchmarks.slots import AllSlots
from tests.moe.contexts import context
from tests.moe.test_routing import dense_weights


def test_all_slots_hold_the_same_choice():
    scores = jax.random.normal(jax.random.key(0), (7, 5))
    want, found = (router(scores, {}, context(scores)) for router in (TopK(), AllSlots()))
    assert (want.slots_per_token, found.slots_per_token) == (2, 5)
    np.testing.assert_array_equal(dense_weights(found, 7, 5), dense_weights(want, 7, 5))
    np.testing.assert_array_equal((found.expert < 5).reshape(7, 5).sum(axis=1), 2)

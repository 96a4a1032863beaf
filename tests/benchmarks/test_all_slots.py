"""The layout that `benchmarks.slots` times is the same choice."""

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config import ExpertsConfig
from aoe_jax.experts.selection.base import Given
from aoe_jax.experts.selection.top_k import TopK
from benchmarks.all_slots import AllSlots
from tests.experts.test_selection import dense_weights


def test_all_slots_hold_the_same_choice():
    experts, scores = (
        ExpertsConfig(n_experts=5, top_k=2),
        jax.random.normal(jax.random.key(0), (7, 5)),
    )
    given = Given(None, jnp.ones(7), None, {}, {}, None, None, True)
    want, found = (
        method.choose(experts, scores, given).assignment for method in (TopK(), AllSlots())
    )
    assert (want.slots_per_token, found.slots_per_token) == (2, 5)
    np.testing.assert_array_equal(dense_weights(found, 7, 5), dense_weights(want, 7, 5))
    np.testing.assert_array_equal((found.expert < 5).reshape(7, 5).sum(axis=1), 2)

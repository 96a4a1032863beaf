"""Experts of a layer merged by clusters."""

import numpy as np
import pytest

from aoe_jax.pruning.clustering import Cluster
from aoe_jax.pruning.merging import membership, merge, score_targets
from tests.pruning.experts import SHAPES, disguised, draw

CLUSTERS = [Cluster(1, (0, 1, 3), (0.2, 0.5, 0.3)), Cluster(2, (2,), (1.0,))]


def layer(experts, dtype="float32"):
    return {
        name: np.stack([expert[name] for expert in experts]).astype(dtype) for name in experts[0]
    }


@pytest.mark.parametrize("kind", SHAPES)
def test_copies_are_merged_into_the_original(kind):
    expert = draw(kind)
    weights = layer([disguised(expert, 1), expert, draw(kind, 7), disguised(expert, 2)])
    merged = merge(weights, CLUSTERS)
    for name, a in merged.items():
        np.testing.assert_allclose(a[0], expert[name], atol=1e-6)
        np.testing.assert_array_equal(a[1], weights[name][2])


def test_members_are_weighed():
    """Experts that need no alignment: all but the scale of the whole is the same."""
    expert = draw("router")
    scaled = [{name: factor * a for name, a in expert.items()} for factor in (3.0, 1.0, 9.0, 2.0)]
    merged = merge(layer(scaled), CLUSTERS)
    for name, a in merged.items():
        np.testing.assert_allclose(a[0], (0.2 * 3 + 0.5 * 1 + 0.3 * 2) * expert[name], rtol=1e-5)


def test_dtypes_stay():
    merged = merge(layer([draw("aoe", seed) for seed in range(4)], "float16"), CLUSTERS)
    assert {a.dtype.name for a in merged.values()} == {"float16"}
    assert {name: a.shape for name, a in merged.items()} == {
        n: (2, *shape) for n, shape in SHAPES["aoe"].items()
    }


def test_membership():
    np.testing.assert_array_equal(membership(CLUSTERS, 5), [[1, 0], [1, 0], [0, 1], [1, 0], [0, 0]])


def test_the_mean_of_the_scores_that_members_were_chosen_by():
    mean, chosen = np.array([1.0, 2, 3, 4]), np.array([20.0, 50, 0, 30])
    found = score_targets(CLUSTERS, mean, chosen, chosen_score=chosen * [5, 6, 0, 7])
    np.testing.assert_allclose(found, [0.2 * 5 + 0.5 * 6 + 0.3 * 7, 3])

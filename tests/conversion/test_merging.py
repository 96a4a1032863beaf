"""Experts of a layer: which are similar, how they are aligned, and what they are merged into."""

import numpy as np
import pytest

from aoe_jax.conversion.merging import (
    METHODS,
    Cluster,
    aligned,
    find_clusters,
    membership,
    merge,
    score_targets,
    similarity,
)
from tests.conversion.experts import SHAPES, disguised, draw, output

LOAD = np.array([0.1, 0.5, 0.2, 0.4, 0.3, 0.5])


def scores(n_groups=3, noise=0.1, mean=0.0):
    """Of six experts over tokens: of experts i and i + 3 alike."""
    rng = np.random.default_rng(0)
    return (
        np.tile(rng.normal(size=(500, n_groups)), 6 // n_groups)
        + noise * rng.normal(size=(500, 6))
        + mean
    )


def second_moments(h):
    return (h - h.mean(axis=0)).T @ (h - h.mean(axis=0))


def test_similarity_is_of_cosines():
    h = scores()
    s = similarity(second_moments(h))
    np.testing.assert_allclose(s, (1 + np.corrcoef(h.T)) / 2, atol=1e-12)
    np.testing.assert_array_equal(s, s.T)
    np.testing.assert_array_equal(np.diagonal(s), 1)
    assert s.min() >= 0 and s.max() <= 1
    opposite = similarity(second_moments(np.stack([h[:, 0], -h[:, 0]], axis=1)))
    np.testing.assert_allclose(opposite, np.eye(2), atol=1e-12)


def test_an_expert_without_scores_is_like_none():
    h = scores()
    h[:, 2] = 0
    s = similarity(h.T @ h)
    np.testing.assert_array_equal(s[2], [0.5, 0.5, 1, 0.5, 0.5, 0.5])


def test_norms_that_lie_far_from_0_must_be_centred():
    h = scores(mean=20.0)
    raw, centred = similarity(h.T @ h), similarity(second_moments(h))
    apart = ~np.tile(np.eye(3, dtype=bool), (2, 2))
    assert raw.min() > 0.99 and centred[apart].max() < 0.6 < 0.9 < centred[~apart].min()


@pytest.mark.parametrize("n_clusters", range(1, 7))
@pytest.mark.parametrize("method", METHODS)
def test_as_many_clusters_as_are_asked_for(method, n_clusters):
    found = find_clusters(method, similarity(second_moments(scores())), LOAD, n_clusters)
    assert len(found) == n_clusters == len({cluster.reference for cluster in found})
    members = sorted(member for cluster in found for member in cluster.members)
    assert len(set(members)) == len(members)
    assert members == list(range(6)) if method != "greedy" else len(members) == n_clusters
    assert found == find_clusters(method, similarity(second_moments(scores())), LOAD, n_clusters)
    assert [cluster.reference for cluster in found] == sorted(
        cluster.reference for cluster in found
    )
    for cluster in found:
        np.testing.assert_allclose(sum(cluster.weights), 1)
        share = LOAD[list(cluster.members)]
        np.testing.assert_allclose(cluster.weights, share / share.sum())
        assert LOAD[cluster.reference] == share.max() and cluster.reference in cluster.members


@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_like_goes_with_like(mean):
    found = find_clusters("uncurl", similarity(second_moments(scores(mean=mean))), LOAD, 3)
    assert {cluster.members for cluster in found} == {(0, 3), (1, 4), (2, 5)}


@pytest.mark.parametrize("n_clusters", [2, 3, 5])
def test_equal_experts_are_split_all_the_same(n_clusters):
    found = find_clusters("uncurl", np.ones((6, 6)), LOAD, n_clusters)
    assert len(found) == n_clusters
    assert sorted(member for cluster in found for member in cluster.members) == list(range(6))


def test_baselines_go_by_frequency():
    s = similarity(second_moments(scores()))
    kept = find_clusters("greedy", s, LOAD, 3)
    assert kept == [Cluster(number, (number,), (1.0,)) for number in (1, 3, 5)]
    merged = find_clusters("frequency_merge", s, LOAD, 3)
    assert [(cluster.reference, cluster.members) for cluster in merged] == [
        (1, (1, 4)),
        (3, (0, 3)),
        (5, (2, 5)),
    ]
    np.testing.assert_allclose(merged[0].weights, [0.5 / 0.8, 0.3 / 0.8])


def test_experts_that_nobody_chooses_weigh_alike():
    assert Cluster.of([2, 0], np.zeros(3)) == Cluster(0, (0, 2), (0.5, 0.5))


X = np.random.default_rng(9).normal(size=(30, 16))
KINDS = pytest.mark.parametrize("kind", SHAPES)


def same_function(a, b):
    for one, other in zip(output(a, X), output(b, X), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


@KINDS
def test_a_disguise_is_seen_through(kind):
    expert = draw(kind)
    hidden = disguised(expert, seed=5)
    same_function(expert, hidden)
    assert max(np.abs(hidden[name] - expert[name]).max() for name in expert) > 0.5
    found = aligned(expert, hidden)
    for name in expert:
        np.testing.assert_allclose(found[name], expert[name], atol=1e-10)


@KINDS
def test_what_an_expert_computes_stays(kind):
    """Aligned to one that has nothing in common with it; it comes nearer all the same."""
    reference, expert = draw(kind), draw(kind, seed=1)
    found = aligned(reference, expert)
    same_function(found, expert)

    def likeness(other):
        return sum(np.vdot(reference[name], other[name]) for name in reference)

    assert likeness(found) > likeness(expert) + 5


def test_the_order_of_hidden_units_alone_does_not_suffice():
    """The average of an AoE expert and a rotated copy has smaller norms, unless the rotation is
    undone.
    """
    expert = draw("aoe")
    hidden = disguised(expert, seed=5)
    norms = output(expert, X)[1]
    plain = np.linalg.norm(X @ (expert["w_gate_down"] + hidden["w_gate_down"]) / 2, axis=1) / norms
    undone = (
        np.linalg.norm(
            X @ (expert["w_gate_down"] + aligned(expert, hidden)["w_gate_down"]) / 2, axis=1
        )
        / norms
    )
    assert plain.mean() < 0.85
    np.testing.assert_allclose(undone, 1, atol=1e-10)


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

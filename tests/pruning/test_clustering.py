"""Similarities and clusters of experts."""

import numpy as np
import pytest

from aoe_jax.pruning.clustering import METHODS, Cluster, find_clusters, similarity

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

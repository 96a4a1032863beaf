"""Clusters of similar experts, and the experts of a cluster merged into one.

Z experts of a layer, D clusters. An expert is a dictionary of arrays: `w_up [d, f]`,
`w_down [f, d]`, and `w_gate [d, f]` or, with a factorised gate, `w_gate_down [d, r]` and
`w_gate_up [r, f]`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning

FACTORS = ("w_gate_down", "w_gate_up")
EXPERT_WEIGHTS = (*FACTORS, "w_gate", "w_up", "w_down")
_ROUNDS = 2  # of rotation and permutation, each of which depends on the other


@dataclass(frozen=True)
class Cluster:
    """Experts that are merged into one."""

    reference: int  # the member with the largest load, to which the others are aligned
    members: tuple[int, ...]  # rising, with the reference
    weights: tuple[float, ...]  # of the members in the mean; they sum to 1

    @classmethod
    def of(cls, members, load):
        """Weights members by `load [Z]`, how often each is chosen; equally if none ever is."""
        members = tuple(sorted(map(int, members)))
        share = np.asarray(load, np.float64)[list(members)]
        if share.sum() == 0:
            share = np.ones(len(members))
        weights = share / share.sum()
        return cls(members[int(np.argmax(share))], members, tuple(weights.tolist()))


def similarity(moments: np.ndarray) -> np.ndarray:
    """`(1 + cosine) / 2` of the scores of every two experts.

    An expert whose scores are all 0 has cosine 0 with the others.

    Args:
      moments: `[Z, Z]`, second moments of the scores.

    Returns:
      `[Z, Z]` in [0, 1], 1 on the diagonal.
    """
    length = np.sqrt(np.diagonal(moments))
    scale = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    cosine = np.clip(moments * scale[:, None] * scale[None, :], -1, 1)
    result = (1 + (cosine + cosine.T) / 2) / 2
    np.fill_diagonal(result, 1.0)
    return result


def uncurl(similarity, load, n_clusters, seed):
    """Spectral clustering of the similarities (UNCURL, Sarkar et al. 2024, arXiv 2409.01483)."""
    n = len(load)
    labels = np.zeros(n, int) if n_clusters == 1 else np.arange(n)
    if 1 < n_clusters < n:
        spectral = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of equal experts, split below
            labels = spectral.fit_predict(similarity)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while len(groups) < n_clusters:  # equal experts are fewer points than clusters
        largest = max(groups, key=len)
        groups = [group for group in groups if group is not largest] + [largest[:1], largest[1:]]
    return [Cluster.of(group, load) for group in groups]


def frequency_merge(similarity, load, n_clusters, seed):
    """Each of the D experts with the largest load is joined by the experts most similar to it."""
    order = np.argsort(-np.asarray(load), kind="stable")
    centres, others = order[:n_clusters], order[n_clusters:]
    groups = {int(centre): [centre] for centre in centres}
    for other in others:
        groups[int(centres[np.argmax(similarity[other, centres])])].append(other)
    return [Cluster.of(group, load) for group in groups.values()]


def greedy(similarity, load, n_clusters, seed):
    """The D experts with the largest load stay as they are, and the others are dropped."""
    order = np.argsort(-np.asarray(load), kind="stable")
    return [Cluster.of([centre], load) for centre in order[:n_clusters]]


METHODS = {"uncurl": uncurl, "frequency_merge": frequency_merge, "greedy": greedy}


def find_clusters(method, similarity, load, n_clusters, seed=0):
    """The clusters of a layer, in the order of their references.

    Args:
      method: a name of `METHODS`.
      similarity: `[Z, Z]`, of `similarity`.
      load: `[Z]`, how often each expert is chosen.
      n_clusters: D.
      seed: of k-means.

    Returns:
      A list of D `Cluster`s.
    """
    clusters = METHODS[method](similarity, load, n_clusters, seed)
    return sorted(clusters, key=lambda cluster: cluster.reference)


def aligned(reference, expert):
    """The form of `expert` that is nearest to `reference`; it computes the same function.

    Hidden units can be permuted, and the low rank of a factorised gate rotated: for every
    orthogonal Q, `(w_gate_down Q, Q^T w_gate_up)` has the same product and the same norms
    `|x w_gate_down|`. The rotation solves the orthogonal Procrustes problem for w_gate_down and
    w_gate_up together, the permutation the assignment problem for w_gate_up or w_gate, w_up and
    w_down. Signs and scales of w_up and w_down stay.
    """
    low_rank = "w_gate_down" in expert
    for _ in range(_ROUNDS if low_rank else 1):
        if low_rank:
            there, here = (
                np.concatenate([e["w_gate_down"], e["w_gate_up"].T]) for e in (reference, expert)
            )
            q = orthogonal_procrustes(here, there)[0]
            expert = expert | {
                "w_gate_down": expert["w_gate_down"] @ q,
                "w_gate_up": q.T @ expert["w_gate_up"],
            }
        by_column = ("w_gate_up" if low_rank else "w_gate", "w_up")
        likeness = reference["w_down"] @ expert["w_down"].T
        for name in by_column:
            likeness += reference[name].T @ expert[name]
        order = linear_sum_assignment(likeness, maximize=True)[1]
        expert = expert | {name: expert[name][:, order] for name in by_column}
        expert["w_down"] = expert["w_down"][order]
    return expert


def merge(weights: dict[str, np.ndarray], clusters: Sequence[Cluster]) -> dict[str, np.ndarray]:
    """Averages the aligned experts of each cluster, weighted by how often they are chosen.

    Args:
      weights: of the experts of a layer, `[Z, ...]` by name.
      clusters: D of them. A cluster of one is its expert, bit for bit.

    Returns:
      The weights of the merged experts, `[D, ...]` by name, in the same dtypes.
    """
    merged = {name: np.empty((len(clusters), *a.shape[1:]), a.dtype) for name, a in weights.items()}
    for number, cluster in enumerate(clusters):
        for name, a in _average(weights, cluster).items():
            merged[name][number] = a
    return merged


def _average(weights, cluster):
    if len(cluster.members) == 1:
        return {name: a[cluster.reference] for name, a in weights.items()}

    def expert(number):
        return {name: a[number].astype(np.float32) for name, a in weights.items()}

    reference = expert(cluster.reference)
    total = {name: np.zeros_like(a) for name, a in reference.items()}
    for number, weight in zip(cluster.members, cluster.weights, strict=True):
        member = reference if number == cluster.reference else aligned(reference, expert(number))
        for name, a in member.items():
            total[name] += np.float32(weight) * a
    return total


def membership(clusters: Sequence[Cluster], n_experts) -> np.ndarray:
    """`[Z, D]`, 1 where an expert is a member of a cluster, else 0."""
    members = np.zeros((n_experts, len(clusters)))
    for number, cluster in enumerate(clusters):
        members[list(cluster.members), number] = 1
    return members


def score_targets(clusters: Sequence[Cluster], mean, chosen, chosen_score) -> np.ndarray:
    """The mean score with which tokens chose the members of each cluster.

    Args:
      clusters: D of a layer.
      mean: `[Z]`, the mean scores over all tokens, used for experts that no token chose.
      chosen: `[Z]`, how many tokens chose each expert.
      chosen_score: `[Z]`, the sum of an expert's scores over these tokens.

    Returns:
      `[D]`, the mean over the members by their weights.
    """
    own = np.where(chosen > 0, chosen_score / np.maximum(chosen, 1), mean)
    return np.array([np.dot(cluster.weights, own[list(cluster.members)]) for cluster in clusters])

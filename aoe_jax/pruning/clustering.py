"""Which experts of a layer become one: clusters by the similarity of scores, or by how often
experts are chosen.

Z experts of one layer, D clusters.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning


@dataclass(frozen=True)
class Cluster:
    """Experts that are merged into one."""

    reference: int  # the one that is chosen most often, to which the others are aligned
    members: tuple[int, ...]  # rising, the reference among them
    weights: tuple[float, ...]  # of the members in the mean; they sum to 1

    @classmethod
    def of(cls, members, load):
        """Weighed by how often each member is chosen, `load [Z]`; alike where none ever is."""
        members = tuple(sorted(map(int, members)))
        chosen = np.asarray(load, np.float64)[list(members)]
        weights = (
            chosen / chosen.sum() if chosen.sum() > 0 else np.full(len(members), 1 / len(members))
        )
        return cls(members[int(np.argmax(chosen))], members, tuple(weights.tolist()))


def similarity(moments: np.ndarray) -> np.ndarray:
    """`(1 + cosine) / 2` of experts' scores, from their second moments: `[Z, Z]` -> `[Z, Z]` in [0,
    1], 1 on the diagonal.

    An expert whose scores are all 0 is alike to none.
    """
    length = np.sqrt(np.diagonal(moments))
    scale = np.where(length > 0, 1 / np.where(length > 0, length, 1), 0)
    cosine = np.clip(moments * scale[:, None] * scale[None, :], -1, 1)
    result = (1 + (cosine + cosine.T) / 2) / 2
    np.fill_diagonal(result, 1.0)
    return result


def uncurl(similarity, load, n_clusters, seed):
    """Spectral clustering of the similarities (UNCURL, Sarkar et al. 2024, arXiv 2409.01483): `D`
    clusters of all experts.

    Args:
      similarity: `[Z, Z]`, of `similarity`.
      load: `[Z]`, how often each expert is chosen.
      n_clusters: D.
      seed: of k-means.
    """
    n = len(load)
    labels = np.zeros(n, int) if n_clusters == 1 else np.arange(n)
    if 1 < n_clusters < n:
        spectral = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # of experts that are equal; they are split below
            labels = spectral.fit_predict(similarity)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while len(groups) < n_clusters:  # equal experts: k-means has fewer places than clusters
        largest = max(groups, key=len)
        groups = [group for group in groups if group is not largest] + [largest[:1], largest[1:]]
    return [Cluster.of(group, load) for group in groups]


def frequency_merge(similarity, load, n_clusters, seed):
    """The D experts that are chosen most often are centres; every other joins the one whose scores
    are most like its own.
    """
    centres, others = _by_load(load, n_clusters)
    groups = {int(centre): [centre] for centre in centres}
    for other in others:
        groups[int(centres[np.argmax(similarity[other, centres])])].append(other)
    return [Cluster.of(group, load) for group in groups.values()]


def greedy(similarity, load, n_clusters, seed):
    """The D experts that are chosen most often stay as they are; the others go."""
    return [Cluster.of([centre], load) for centre in _by_load(load, n_clusters)[0]]


METHODS = {"uncurl": uncurl, "frequency_merge": frequency_merge, "greedy": greedy}


def find_clusters(method, similarity, load, n_clusters, seed=0):
    """The `Cluster`s of a layer by one of `METHODS`, in the order of their references; arguments as
    in `uncurl`.
    """
    return sorted(
        METHODS[method](similarity, load, n_clusters, seed), key=lambda cluster: cluster.reference
    )


def _by_load(load, n):
    """The n experts that are chosen most often, and the others; of equals the lower number comes
    first.
    """
    order = np.argsort(-np.asarray(load), kind="stable")
    return order[:n], order[n:]

"""The experts of a layer merged by clusters: aligned, and averaged by how often they are chosen.

Z experts, D clusters.
"""

from collections.abc import Sequence

import numpy as np

from aoe_jax.pruning.alignment import aligned
from aoe_jax.pruning.clustering import Cluster


def merge(weights: dict[str, np.ndarray], clusters: Sequence[Cluster]) -> dict[str, np.ndarray]:
    """The experts of a layer, `[Z, ...]` by name, as D merged ones, `[D, ...]` in the same dtypes.

    A cluster of one is that expert, bit for bit.
    """
    merged = {name: np.empty((len(clusters), *a.shape[1:]), a.dtype) for name, a in weights.items()}
    for number, cluster in enumerate(clusters):
        for name, a in _merged(weights, cluster).items():
            merged[name][number] = a
    return merged


def _merged(weights, cluster):
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
    """The mean score `[D]` by which tokens chose a cluster's members: their own means, weighed by
    how often each is chosen.

    Args:
      clusters: of the layer.
      mean: `[Z]`, the mean scores over all tokens, which count where no token chose a member.
      chosen: `[Z]`, how many tokens chose each expert.
      chosen_score: `[Z]`, the sum of an expert's scores over these tokens.
    """
    own = np.where(chosen > 0, chosen_score / np.maximum(chosen, 1), mean)
    return np.array([np.dot(cluster.weights, own[list(cluster.members)]) for cluster in clusters])

"""Finds clusters of similar experts, merges each cluster into one expert, and builds the model.

Each layer is processed alone. The methods are UNCURL (Sarkar et al. 2024, arXiv 2409.01483) and two
baselines of the same paper:

- `uncurl`. `H [tokens, Z]` are the scores of Z experts. `S [Z, Z]` is `(1 + cosine) / 2` for every
  two columns of H. Spectral clustering of S computes D clusters (symmetric normalised Laplacian and
  k-means; the paper does not name the Laplacian). In each cluster, the hidden units of the experts
  are permuted so that their weights are nearest to those of the expert with the largest load. Then
  the experts are averaged, with their loads as weights.
- `frequency_merge`. The D experts with the largest loads are cluster centres, and each other expert
  is assigned to the centre with the largest S. Experts are permuted and averaged in the same way.
- `greedy`. The D experts with the largest loads are kept unchanged, the others are dropped.

The scores of a router MoE are its logits. `greedy` keeps the router columns of the kept experts;
the paper does not mention the router here. The other methods make a random router, which must be
trained alone first (`train.router_steps`). The paper does not prune the first layer, but here all
layers get D experts, because scanned layers must have equal shapes. Negating both w_up and w_down
of a hidden unit does not change its output, but the alignment does not try this.

The paper does not treat AoE. AoE's scores are norms, whose means are far from 0, so cosines are
computed from centred norms. The low-rank axis of w_gate_down and w_gate_up is aligned too, by a
rotation (Procrustes); rotation and permutation are computed alternately, twice each. An average has
smaller norms than its members. So w_gate_down of a merged expert is scaled to the weighted mean of
the members' Frobenius norms, and w_gate_up is divided by the same factor to keep their product.

Notation: L layers, Z experts in each, D clusters, d model width. An expert is a dict of arrays:
`w_up [d, f]`, `w_down [f, d]`, and `w_gate [d, f]` or, with a factorised gate, `w_gate_down [d, r]`
and `w_gate_up [r, f]`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from tqdm import tqdm

from aoe_jax.conversion.observations import Moments
from aoe_jax.evaluation.models import Model
from aoe_jax.model.declared import state_shardings
from aoe_jax.parameters import matrix_init, shared_expert

EXPERT_WEIGHTS = ("w_gate_down", "w_gate_up", "w_gate", "w_up", "w_down")
_ROUNDS = 2  # rotation and permutation depend on each other, so both are computed twice


@dataclass(frozen=True)
class Cluster:
    """Experts that are merged into one."""

    reference: int  # the member with the largest load, to which the others are aligned
    members: tuple[int, ...]  # in ascending order, including the reference
    weights: tuple[float, ...]  # weights of the members in the mean; they sum to 1

    @classmethod
    def of(cls, members, load):
        """Returns a cluster. The weights are proportional to `load [Z]`, or equal if all are 0."""
        members = tuple(sorted(map(int, members)))
        share = np.asarray(load, np.float64)[list(members)]
        if share.sum() == 0:
            share = np.ones(len(members))
        weights = share / share.sum()
        return cls(members[int(np.argmax(share))], members, tuple(weights.tolist()))


def similarity(moments: np.ndarray) -> np.ndarray:
    """Computes `S [Z, Z] = (1 + cosine) / 2` from `moments [Z, Z]`, second moments of the scores.

    If all scores of an expert are 0, its cosine is 0 with the other experts and 1 with itself.
    """
    length = np.sqrt(np.diagonal(moments))
    scale = np.divide(1, length, out=np.zeros_like(length), where=length > 0)
    cosine = np.clip(moments * scale[:, None] * scale[None, :], -1, 1)
    result = (1 + (cosine + cosine.T) / 2) / 2
    np.fill_diagonal(result, 1.0)
    return result


def uncurl(similarity, load, n_clusters, seed):
    """Clusters experts by spectral clustering of their similarities (UNCURL, arXiv 2409.01483)."""
    n = len(load)
    labels = np.zeros(n, int) if n_clusters == 1 else np.arange(n)
    if 1 < n_clusters < n:
        spectral = SpectralClustering(n_clusters, affinity="precomputed", random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # equal experts are split below
            labels = spectral.fit_predict(similarity)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    while len(groups) < n_clusters:  # with equal experts, k-means may find too few clusters
        largest = max(groups, key=len)
        groups = [group for group in groups if group is not largest] + [largest[:1], largest[1:]]
    return groups


def greedy(similarity, load, n_clusters, seed):
    """Keeps the D experts with the largest loads unchanged, and drops the others."""
    return np.argsort(-np.asarray(load), kind="stable")[:n_clusters, None]


def frequency_merge(similarity, load, n_clusters, seed):
    """Assigns each expert to the most similar one of the D experts with the largest loads."""
    centres = greedy(similarity, load, n_clusters, seed)[:, 0]
    nearest = centres[np.argmax(similarity[:, centres], axis=1)]
    nearest[centres] = centres
    return [np.flatnonzero(nearest == centre) for centre in centres]


# Functions `(similarity [Z, Z], load [Z], D, seed of k-means) -> D groups of experts`; the load is
# how often each expert is chosen.
METHODS = {"uncurl": uncurl, "frequency_merge": frequency_merge, "greedy": greedy}


def find_clusters(method, similarity, load, n_clusters, seed=0):
    """Computes D `Cluster`s of a layer with one of `METHODS`, sorted by their references."""
    groups = METHODS[method](similarity, load, n_clusters, seed)
    clusters = [Cluster.of(group, load) for group in groups]
    return sorted(clusters, key=lambda cluster: cluster.reference)


def aligned(reference, expert):
    """Permutes and rotates `expert` to be nearest to `reference`, and keeps the expert's outputs.

    The permutation of hidden units solves one assignment problem for w_up, w_down and the gate. The
    rotation Q changes a factorised gate to `w_gate_down Q` and `Q^T w_gate_up`, and keeps the norms
    `|x w_gate_down|`. Q solves the Procrustes problem for both factors together.
    """
    expert, low_rank = dict(expert), "w_gate_down" in expert
    by_column = ("w_gate_up" if low_rank else "w_gate", "w_up")
    for _ in range(_ROUNDS if low_rank else 1):
        if low_rank:
            there, here = (
                np.concatenate([e["w_gate_down"], e["w_gate_up"].T]) for e in (reference, expert)
            )
            q = orthogonal_procrustes(here, there)[0]
            expert["w_gate_down"] = expert["w_gate_down"] @ q
            expert["w_gate_up"] = q.T @ expert["w_gate_up"]
        likeness = reference["w_down"] @ expert["w_down"].T
        for name in by_column:
            likeness += reference[name].T @ expert[name]
        order = linear_sum_assignment(likeness, maximize=True)[1]
        expert |= {name: expert[name][:, order] for name in by_column}
        expert["w_down"] = expert["w_down"][order]
    return expert


def merge(weights: dict[str, np.ndarray], clusters: Sequence[Cluster]) -> dict[str, np.ndarray]:
    """Averages the aligned experts of each cluster with the cluster's weights.

    `weights` are arrays `[Z, ...]` by name, and the results `[D, ...]` have the same dtypes. An
    expert that is alone in its cluster stays bit-identical.
    """
    merged = [_average(weights, cluster) for cluster in clusters]
    return {name: np.stack([expert[name] for expert in merged]) for name in weights}


def _average(weights, cluster):
    if len(cluster.members) == 1:
        return {name: a[cluster.reference] for name, a in weights.items()}
    experts = [
        {name: a[number].astype(np.float32) for name, a in weights.items()}
        for number in cluster.members
    ]
    reference = experts[cluster.members.index(cluster.reference)]
    experts = [e if e is reference else aligned(reference, e) for e in experts]
    share = np.array(cluster.weights, np.float32)
    mean = {name: np.tensordot(share, [e[name] for e in experts], 1) for name in weights}
    if "w_gate_down" in mean:
        norm = share @ [np.linalg.norm(e["w_gate_down"]) for e in experts]
        scale = norm / max(np.linalg.norm(mean["w_gate_down"]), 1e-30)
        mean["w_gate_down"] *= scale
        mean["w_gate_up"] /= scale
    return {name: a.astype(weights[name].dtype) for name, a in mean.items()}


def pruned_params(model: Model, moments: Moments, n_experts, method, seed=0):
    """Computes the parameters of a model with D experts.

    `moments` are those of the model's scores. `n_experts` is D, at most Z. `method` is a name in
    `METHODS`. `seed` is for k-means and a new router. Returns the parameters on the model's
    mesh, and a list of `Cluster`s for every layer. Host memory must have space for all experts of
    one layer and the merged experts of all layers.
    """
    experts = model.params["layers"]["experts"]
    weights = {name: a for name, a in experts.items() if name in EXPERT_WEIGHTS}
    clusters, layers = [], []
    for layer, load in enumerate(tqdm(moments.load, desc=method, unit="layer")):
        of_layer = find_clusters(method, similarity(moments.second[layer]), load, n_experts, seed)
        layers.append(merge({n: jax.device_get(a[layer]) for n, a in weights.items()}, of_layer))
        clusters.append(of_layer)
    merged = {name: np.stack([layer.pop(name) for layer in layers]) for name in weights}
    if "w_router" in experts:
        merged["w_router"] = _router(experts["w_router"], clusters, method, seed)
    merged |= {name: experts[name] for name in shared_expert(model.config.experts)}
    params = model.params | {"layers": model.params["layers"] | {"experts": merged}}
    with jax.set_mesh(model.mesh):
        return jax.device_put(params, state_shardings(model.mesh, params)), clusters


def _router(w_router, clusters, method, seed):
    """Returns `[L, d, D]`: for `greedy`, the columns of the kept experts, else random columns."""
    if method == "greedy":
        kept = [[cluster.reference for cluster in of_layer] for of_layer in clusters]
        return jnp.take_along_axis(w_router, jnp.array(kept)[:, None, :], axis=2)
    shape = (w_router.shape[1], len(clusters[0]))
    keys = jax.random.split(jax.random.key(seed), len(clusters))
    return jnp.stack([matrix_init(key, shape) for key in keys]).astype(w_router.dtype)

"""The parameters of a model with fewer experts.

L layers, Z experts, D merged ones, d model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.evaluation.models import Model
from aoe_jax.parameters import matrix_init
from aoe_jax.pruning.merging import (
    EXPERT_WEIGHTS,
    FACTORS,
    find_clusters,
    membership,
    merge,
    score_targets,
    similarity,
)
from aoe_jax.pruning.moments import MergedScores, Moments
from aoe_jax.sharding import state_shardings


def pruned_params(
    model: Model, moments: Moments, merged_scores: MergedScores, n_experts, method, seed=0
):
    """The parameters of a model with D experts.

    The host holds the experts of one layer, and the merged experts of all layers.

    Args:
      model: the model before pruning.
      moments: of its scores.
      merged_scores: those of merged AoE experts over the same batches.
      n_experts: D, at most Z.
      method: a name of `merging.METHODS`.
      seed: of k-means and of a new router.

    Returns:
      `(params, clusters)`: the parameters on the model's mesh, and a list of `Cluster`s for every
      layer.
    """
    experts, n_layers = model.params["layers"]["experts"], model.config.model.n_layers
    weights = {name: a for name, a in experts.items() if name in EXPERT_WEIGHTS}
    merged = {
        name: np.empty((n_layers, n_experts, *a.shape[2:]), a.dtype) for name, a in weights.items()
    }
    is_aoe = model.config.experts.kind == "aoe"
    second, clusters = moments.scatter if is_aoe else moments.gram, []
    for layer in tqdm(range(n_layers), desc=method, unit="layer"):
        found = similarity(second[layer])
        clusters.append(find_clusters(method, found, moments.load[layer], n_experts, seed))
        of_layer = {name: jax.device_get(a[layer]) for name, a in weights.items()}
        for name, a in merge(of_layer, clusters[-1]).items():
            merged[name][layer] = a
    if is_aoe:
        _rescale_norms(merged, moments, merged_scores, clusters)
    else:
        merged["w_router"] = _router(experts["w_router"], clusters, method, seed)
    params = model.params | {"layers": model.params["layers"] | {"experts": merged}}
    with jax.set_mesh(model.mesh):
        return jax.device_put(params, state_shardings(model.mesh, params)), clusters


def _rescale_norms(merged, moments, merged_scores, clusters):
    """Scales w_gate_down of merged experts to the mean scores of their members' choices.

    Averages are shorter than their members. w_gate_up is scaled by the inverse, so that outputs
    stay; clusters of one stay as they are.
    """
    members = np.stack([membership(of_layer, moments.mean.shape[1]) for of_layer in clusters])
    several = members.sum(axis=1) > 1
    if not several.any():
        return
    down, up = FACTORS
    found = merged_scores(merged[down], members)
    of_layers = zip(clusters, moments.mean, moments.chosen, moments.chosen_score, strict=True)
    wanted = np.stack([score_targets(*of_layer) for of_layer in of_layers])
    known = several & (found > 0) & (wanted > 0)
    scale = np.divide(wanted, found, out=np.ones_like(found), where=known)
    scale = scale[:, :, None, None].astype(np.float32)
    merged[down] = (merged[down] * scale).astype(merged[down].dtype)
    merged[up] = (merged[up] / scale).astype(merged[up].dtype)


def _router(w_router, clusters, method, seed):
    """`[L, d, D]`: the columns of the experts that `greedy` keeps, else a new random router."""
    if method == "greedy":
        kept = [[cluster.reference for cluster in of_layer] for of_layer in clusters]
        return jnp.take_along_axis(w_router, jnp.array(kept)[:, None, :], axis=2)
    shape = (w_router.shape[1], len(clusters[0]))
    keys = jax.random.split(jax.random.key(seed), len(clusters))
    return jnp.stack([matrix_init(key, shape) for key in keys]).astype(w_router.dtype)

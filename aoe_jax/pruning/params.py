"""The parameters of a model with fewer experts.

L layers, Z experts, D merged ones, d model width, r low rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aoe_jax.evaluation.models import Model
from aoe_jax.experts.layer import matrix_init
from aoe_jax.pruning.clustering import find_clusters, similarity
from aoe_jax.pruning.merging import membership, merge, score_targets
from aoe_jax.pruning.moments import MergedScores, Moments
from aoe_jax.sharding import state_shardings

EXPERT_WEIGHTS = ("w_down", "w_up", "w_g", "w_p", "w_o")


def pruned_params(
    model: Model, moments: Moments, merged_scores: MergedScores, n_experts, method, seed=0
):
    """`(params, clusters of every layer)`: the parameters of a model with D experts, on its mesh.

    The host holds the experts of one layer, and the merged ones of all.

    Args:
      model: before.
      moments: of its scores.
      merged_scores: those of merged AoE experts over the same batches.
      n_experts: D, at most Z.
      method: one of `clustering.METHODS`.
      seed: of k-means and of a new router.
    """
    experts, n_layers = model.params["layers"]["experts"], model.config.model.n_layers
    weights = {name: a for name, a in experts.items() if name in EXPERT_WEIGHTS}
    merged = {
        name: np.empty((n_layers, n_experts, *a.shape[2:]), a.dtype) for name, a in weights.items()
    }
    is_aoe = model.config.experts.kind == "aoe"
    second, clusters = moments.scatter if is_aoe else moments.gram, []
    for layer in tqdm(range(n_layers), desc=method, unit="layer"):
        alike = similarity(second[layer])
        clusters.append(find_clusters(method, alike, moments.load[layer], n_experts, seed))
        of_layer = merge(
            {name: jax.device_get(a[layer]) for name, a in weights.items()}, clusters[-1]
        )
        for name, a in of_layer.items():
            merged[name][layer] = a
    if is_aoe:
        _rescale_norms(merged, moments, merged_scores, clusters)
    else:
        merged["w_router"] = _router(experts["w_router"], clusters, method, seed)
    params = model.params | {"layers": model.params["layers"] | {"experts": merged}}
    with jax.set_mesh(model.mesh):
        return jax.device_put(params, state_shardings(model.mesh, params)), clusters


def _rescale_norms(merged, moments, merged_scores, clusters):
    """Averages are shorter than what they are of: the norms are scaled to those by which tokens
    chose the members.

    What `Wdown` gains, `Wup` loses. Clusters of one stay as they are.
    """
    members = np.stack([membership(of_layer, moments.mean.shape[1]) for of_layer in clusters])
    several = members.sum(axis=1) > 1
    if not several.any():
        return
    found = merged_scores(merged["w_down"], members)
    of_scores = zip(clusters, moments.mean, moments.chosen, moments.chosen_score, strict=True)
    wanted = np.stack([score_targets(*of_layer) for of_layer in of_scores])
    scale = np.where(
        several & (found > 0) & (wanted > 0), wanted / np.where(found > 0, found, 1), 1
    )
    scale = scale[:, :, None, None].astype(np.float32)
    merged["w_down"] = (merged["w_down"] * scale).astype(merged["w_down"].dtype)
    merged["w_up"] = (merged["w_up"] / scale).astype(merged["w_up"].dtype)


def _router(w_router, clusters, method, seed):
    """`[L, d, D]`: the columns of experts that stay as they are; for merged ones a router drawn
    anew.
    """
    if method == "greedy":
        kept = [[cluster.reference for cluster in of_layer] for of_layer in clusters]
        return jnp.take_along_axis(w_router, jnp.array(kept)[:, None, :], axis=2)
    shape = (w_router.shape[1], len(clusters[0]))
    keys = jax.random.split(jax.random.key(seed), len(clusters))
    return jnp.stack([matrix_init(key, shape) for key in keys]).astype(w_router.dtype)

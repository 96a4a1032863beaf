"""Prunes a trained model to fewer experts, for the command `aoe_jax.prune`."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from tabulate import tabulate

from aoe_jax.config.checks import require, require_flag
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.conversion.exporting import in_words, write_figures, write_result
from aoe_jax.conversion.merging import pruned_params
from aoe_jax.conversion.observations import calibration_batches, evaluation_on, score_moments
from aoe_jax.evaluation.models import Model, load_model, local_model, source_config
from aoe_jax.formats.writing import new_directory, parameters_of
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.load_balance import load_entropy

log = logging.getLogger(__name__)

PRUNABLE = ("top_k", "top_p", "sparsemixer", "erc", "capacity")  # methods that use only the scores


def prune(
    workdir: Path,
    output: Path,
    n_experts: int,
    method="uncurl",
    data=None,
    n_tokens=100_000,
    seed=0,
    step="newest",
    mesh=None,
):
    """Writes a model with fewer experts to `output`, which does not exist before it is complete.
    Prints a table. The arguments are the flags of `aoe_jax.prune`.

    Returns the content of `prune.json` in `output`: `method`, `step`, the number of `tokens` for
    which scores were computed, validation `nll` `before` and `after` pruning, and a list `layers`:
    the `load` of the experts on these tokens, the entropies of their validation loads before
    (`load_entropy`) and after pruning (`load_entropy_after`), and the `clusters` of experts. Raises
    `UserError` if the model, data or number of experts is not supported.
    """
    with new_directory(output) as directory:
        source = local_model(workdir)
        model = load_model(source, step, mesh)
        check_prunes(model, n_experts, workdir)
        train, validation = calibration_batches(model, workdir, data, n_tokens, seed)
        moments = score_moments(model, train)
        wanted = "the scores of its experts are not finite; the model is damaged"
        require_flag(np.isfinite(moments.second).all(), "workdir", workdir, wanted)
        before = evaluation_on(model, validation)
        params, clusters = pruned_params(model, moments, n_experts, method, seed)
        decoder = Decoder.from_config(_pruned(model.config, n_experts))
        changes = {"decoder": decoder, "params": params, "routing_state": {}}
        after = evaluation_on(dataclasses.replace(model, **changes), validation)
        layers = [
            {
                "load": moments.load[layer].tolist(),
                "load_entropy": float(load_entropy(before.stats.load[layer])),
                "load_entropy_after": float(load_entropy(after.stats.load[layer])),
                "clusters": [dataclasses.asdict(cluster) for cluster in of_layer],
            }
            for layer, of_layer in enumerate(clusters)
        ]
        nll = {"before": before.nll, "after": after.nll}
        report = {"method": method, "step": model.step, "tokens": moments.tokens}
        report |= {"nll": nll, "layers": layers}
        config = _pruned(source_config(source), n_experts)
        write_result(directory, source, model.step, config, parameters_of(params)[1])
        counts = f"{model.config.experts.n_experts} experts of a layer became {n_experts}"
        result = f"{counts} by `{method}`; validation {in_words(nll)}"
        write_figures(directory, workdir, model.step, config, "prune", report, result)
    print(prune_table(report))
    if "selection_bias" in model.routing_state:
        log.warning(
            "the selection bias of loss-free balancing was made for the old experts, so the result "
            "has none and balance.bias_rate=0; set a rate to train with a new bias"
        )
    if model.config.experts.has_router and method != "greedy":
        log.warning(
            "the router is a new random one, so the nll has no meaning before the router is "
            "trained, see train.router_steps"
        )
    return report


def check_prunes(model: Model, n_experts, workdir):
    """Raises `UserError` if a model cannot be pruned to this number of experts."""
    e, router = model.config.experts, model.config.routing.name
    wanted = f"pruning is not implemented; use a model with {', '.join(PRUNABLE)}"
    require(router in PRUNABLE, "routing.name", router, wanted)
    wanted = "merging reorders the neurons of experts; use factorised gates or a router"
    require(e.score_neurons is None, "experts.score_neurons", e.score_neurons, wanted)
    wanted = "only experts that are scored by norms can be merged"
    require(e.score == "norm", "experts.score", e.score, wanted)
    wanted = "a large router cannot be pruned, because its width depends on the experts"
    require(not e.large_router, "experts.large_router", True, wanted)
    wanted = (
        f"must be at least experts.top_k={e.top_k} and fewer than the {e.n_experts} experts of "
        f"{workdir}"
    )
    require_flag(e.top_k <= n_experts < e.n_experts, "experts", n_experts, wanted)
    n_devices = model.config.mesh.expert
    wanted = f"must be a multiple of mesh.expert={n_devices}; --mesh changes the mesh"
    require_flag(n_experts % n_devices == 0, "experts", n_experts, wanted)


def _pruned(config, n_experts):
    experts = dataclasses.replace(config.experts, n_experts=n_experts)
    balance = dataclasses.replace(config.balance, bias_rate=0.0)
    # The mesh is reset, because its expert axis must divide the number of experts.
    return dataclasses.replace(config, experts=experts, balance=balance, mesh=MeshConfig())


def prune_table(report):
    """Formats the report of `prune` as a table, one row per layer; experts are numbered from 0."""
    rows = []
    for layer in report["layers"]:
        share = np.array(layer["load"]) / sum(layer["load"])
        clusters = [list(cluster["members"]) for cluster in layer["clusters"]]
        shown = [f"{'+'.join(map(str, c))} {share[c].sum():.1%}" for c in clusters]
        rows.append([layer["load_entropy"], layer["load_entropy_after"], "  ".join(shown)])
    head = "experts merged into one, and their share of the load"
    table = tabulate(rows, ["layer", "Ent_load", "after", head], "plain", ".3f", showindex=True)
    most = f"Ent_load is at most {np.log(len(share)):.3f}, after {np.log(len(clusters)):.3f}"
    return f"{table}\n{most}; validation {in_words(report['nll'])}"

"""Converts a router MoE into an AoE: drops the router, and either factorises the gates or moves the
scoring neurons of each expert to the front.
"""

import dataclasses
import functools
import logging
from pathlib import Path

import numpy as np

from aoe_jax.config.checks import require, require_flag
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.conversion.exporting import in_words, write_figures, write_result
from aoe_jax.conversion.observations import calibration_batches, evaluation_on, observations
from aoe_jax.conversion.scoring_neurons import agreement, in_front, telling_neurons
from aoe_jax.evaluation.models import load_model, local_model, mesh_for, source_config
from aoe_jax.formats.writing import new_directory, parameters_of
from aoe_jax.moe.routing import TopK

log = logging.getLogger(__name__)

CONVERTIBLE = ("top_k", "top_p", "expert_choice", "sparsemixer", "erc")
_GATE = "layers/experts/w_gate"
_FACTORS = ("layers/experts/w_gate_down", "layers/experts/w_gate_up")
# Matrices of an expert -> the axis of its neurons, counted from the end.
_NEURONS = {_GATE: -1, "layers/experts/w_up": -1, "layers/experts/w_down": -2}


def convert(
    checkpoint: Path,
    output: Path,
    d_low: int | None = None,
    score_neurons: int | None = None,
    score="norm",
    data=None,
    n_tokens=8192,
    seed=0,
    mesh=None,
):
    """Writes the AoE of a router MoE to `output`, which does not exist before it is complete.

    The arguments are the flags of `aoe_jax.convert`. Prints a summary. Raises `UserError` if the
    checkpoint or the corpus cannot be read, or the model cannot be converted.

    Returns the content of `convert.json` in `output`: the settings and, for factorised gates,
    `energy_kept`, the fraction of the sum of squares of W_gate that the factors keep, per expert
    and as a mean. With `score_neurons` or `data` it also has the `nll` on held-out text `before`
    and `after`, and `agreement`, the fraction of the router's choices that the scores make too: its
    `mean`, its values in the `layers`, and the value that random choices would have (`chance`).
    """
    checkpoint = local_model(checkpoint)
    config = source_config(checkpoint)
    converted = _converted(config, d_low, score_neurons, score)
    with new_directory(output) as directory:
        model = load_model(checkpoint, mesh=mesh)
        step, (_, read) = model.step, parameters_of(model.params)
        if "selection_bias" in model.routing_state:
            log.warning(
                "the selection bias of loss-free balancing is dropped with the router, because it "
                "was made for the router's logits"
            )
        if config.routing.name == "sparsemixer":
            log.warning(
                "routing.name='sparsemixer' needs logits around 0; the converted AoE uses 'top_k'"
            )
        is_measured = score_neurons is not None or data is not None
        if is_measured:
            mesh = mesh_for(converted, model)
            calibration, held_out = calibration_batches(model, checkpoint, data, n_tokens, seed)
        if score_neurons is None:
            report = {"d_low": d_low, "d_wide": converted.experts.d_wide}
            form, energy = f"factorised gates of rank {d_low} compute the scores", []
            parameter = _factorised(read, d_low, energy)
        else:
            report = {"score_neurons": score_neurons, "score": score}
            form = f"the first {score_neurons} neurons of an expert compute its score"
            parameter = _reordered(read, _observed(model, calibration), score_neurons, score)
        write_result(directory, checkpoint, step, converted, parameter)
        if score_neurons is None:
            report["energy_kept"] = {"mean": float(np.mean(energy)), "layers": energy}
        if is_measured:
            before, observed = evaluation_on(model, held_out).nll, _observed(model, held_out)
            del model, read, parameter  # frees memory for the next model
            model = load_model(directory, mesh=mesh)
            experts = model.params["layers"]["experts"]
            name = "w_gate_down" if score_neurons is None else "w_gate"
            w_score = experts[name][..., :score_neurons]
            shares, by_chance = agreement(observed, w_score, score)
            shares = {"mean": float(shares.mean()), "layers": shares.tolist()}
            report["agreement"] = shares | {"chance": by_chance}
            report["nll"] = {"before": before, "after": evaluation_on(model, held_out).nll}
        result = f"the router is gone, and {form}; {convert_summary(report)}"
        write_figures(directory, checkpoint, step, converted, "convert", report, result)
    print(f"{result}; wrote {output}")
    return report


def convert_summary(report):
    """Formats the report of `convert` as a line of text."""
    parts = []
    if "energy_kept" in report:
        parts.append(f"energy kept: {report['energy_kept']['mean']:.4f} of all")
    if "agreement" in report:
        found = report["agreement"]
        layers = ", ".join(f"{share:.3f}" for share in found["layers"])
        by_chance = f"by chance {found['chance']:.3f}"
        parts.append(f"agreement with the router: {found['mean']:.3f} ({by_chance}; {layers})")
        parts.append(in_words(report["nll"]))
    return "; ".join(parts)


def _observed(model, batches):
    """Concatenates the `observations` of all batches: logits, choices and inputs."""
    of_batches = zip(*observations(model, batches, with_inputs=True), strict=True)
    return tuple(np.concatenate(arrays, axis=1) for arrays in of_batches)


def _factorised(read, rank, energy):
    """Returns a function for `write_model`. It factorises gates `[n, d, f]` to rank r by a singular
    value decomposition `U S V^T` in float32: `w_gate_down = U_r S_r [n, d, r]` and
    `w_gate_up = V_r^T [n, r, f]`, so that `|x w_gate_down| = |x w_gate_down w_gate_up|`. For each
    layer, the function appends to `energy` the fraction of `|W_gate|^2` that each expert keeps.
    """

    @functools.lru_cache(maxsize=1)
    def factors(layer):
        w_gate = read(_GATE, layer)
        u, s, v = np.linalg.svd(w_gate.astype(np.float32), full_matrices=False)
        squares = s.astype(np.float64) ** 2
        kept = squares[:, :rank].sum(axis=1) / np.maximum(squares.sum(axis=1), 1e-300)
        energy.append(kept.tolist())
        matrices = u[..., :rank] * s[:, None, :rank], v[:, :rank]
        return {path: a.astype(w_gate.dtype) for path, a in zip(_FACTORS, matrices, strict=True)}

    def parameter(path, layer):
        return factors(layer)[path] if path in _FACTORS else read(path, layer)

    return parameter


def _reordered(read, observed, count, score):
    """Returns a function for `write_model`; it puts the scoring neurons of each expert first."""

    @functools.lru_cache(maxsize=1)
    def order(layer):  # [n, f]
        logits, chosen, x = (a[layer] for a in observed)
        w_gate = read(_GATE, layer)
        neurons = telling_neurons(x, logits, chosen, w_gate, count, score)
        return np.stack([in_front(own, w_gate.shape[-1]) for own in neurons])

    def parameter(path, layer):
        if path not in _NEURONS:
            return read(path, layer)
        axis = _NEURONS[path]
        return np.take_along_axis(read(path, layer), np.expand_dims(order(layer), -3 - axis), axis)

    return parameter


def _converted(config: Config, d_low, score_neurons, score):
    experts, d_model, router = config.experts, config.model.d_model, config.routing.name
    wanted = "only a router MoE without factorised gates can be converted"
    require(experts.kind == "router", "experts.kind", experts.kind, wanted)
    require(not experts.factorised_gate, "experts.factorised_gate", True, wanted)
    wanted = f"the method uses more than scores; convertible are {', '.join(CONVERTIBLE)}"
    require(router in CONVERTIBLE, "routing.name", router, wanted)
    width = f"at most the width {experts.d_ffn} of an expert"
    if score_neurons is None:
        wanted = f"must be below d_model={d_model} and {width}"
        require_flag(d_low < d_model and d_low <= experts.d_ffn, "d_low", d_low, wanted)
        changes = {"d_low": d_low, "d_wide": experts.d_ffn}
    else:
        is_within = score_neurons <= experts.d_ffn
        require_flag(is_within, "score_neurons", score_neurons, f"must be {width}")
        changes = {"score_neurons": score_neurons, "score": score}
    routing = config.routing
    if router == "sparsemixer":
        routing = TopK()
    elif router == "erc":
        routing = TopK(routing.norm_topk_prob)
    return dataclasses.replace(
        config,
        experts=dataclasses.replace(experts, kind="aoe", large_router=False, **changes),
        routing=routing,
        balance=dataclasses.replace(config.balance, bias_rate=0.0),  # the router's bias is dropped
        train=dataclasses.replace(config.train, router_steps=0, scoring_rate=1.0),
        mesh=MeshConfig(),
    )

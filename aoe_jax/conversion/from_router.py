"""Converts a router MoE into an AoE: drops the router, and factorises gates or moves the neurons
that score to the front.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from aoe_jax.config.checks import require_flag
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.conversion.calibration import calibration_batches, mean_nll
from aoe_jax.conversion.scoring_neurons import (
    agreement,
    in_front,
    observed_choices,
    telling_neurons,
)
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import load_model
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.loading import ModelReader, parameter_shapes, read_config, read_step
from aoe_jax.formats.model_card import made_of, write_card
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import new_directory, write_model, write_run
from aoe_jax.moe.routing import TopK
from aoe_jax.storage.files import write_json

log = logging.getLogger(__name__)

CONVERTIBLE = ("top_k", "top_p", "expert_choice", "ranked", "sparsemixer", "erc")
_GATE = "layers/experts/w_gate"
_FACTORS = ("layers/experts/w_gate_down", "layers/experts/w_gate_up")
# The matrices of an expert, with the axis of its neurons among their last two.
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
    """Writes the AoE of a router MoE to `output`, which appears only once it is complete.

    The arguments are the flags of `aoe_jax.convert`. Writing holds the experts of one layer and one
    file in memory; calibration holds the model. Raises `UserError` if the checkpoint or the text
    cannot be read, or the model cannot be converted.

    Returns the content of `convert.json` in `output`: the form; of factors `energy_kept`, the share
    of the squares of W_gate that they keep; with `score_neurons` or `data`, on held-out text `nll`,
    `before` and `after`, and `agreement`, the share of the router's experts that the scores choose
    as well: `mean`, `layers` and `chance`, that of a random choice.
    """
    config = read_config(checkpoint)
    converted = _converted(config, checkpoint, d_low, score_neurons, score)
    reader, is_whole = ModelReader(checkpoint, config), score_neurons is not None
    if "selection_bias" in reader.routing_state:
        log.warning(
            "the selection bias of loss-free balancing goes with the router: it was made for its "
            "logits"
        )
    if config.routing.name == "sparsemixer":
        log.warning(
            "routing.name='sparsemixer' needs logits around 0; the converted AoE uses 'top_k'"
        )
    with new_directory(output) as partial_output:
        is_calibrated = is_whole or data is not None
        if is_calibrated:
            model = load_model(checkpoint, mesh=mesh)
            calibration, held_out = calibration_batches(model, checkpoint, data, n_tokens, seed)
        if is_whole:
            report = {"score_neurons": score_neurons, "score": score}
            observed = observed_choices(model, calibration)
            parameter = _reordered(reader, observed, score_neurons, score)
        else:
            report = {"d_low": d_low, "d_wide": converted.experts.d_wide}
            parameter, energy = _factorised(reader, config.model.n_layers, d_low)

        def checked(path, layer):
            where = path if layer is None else f"{path} of layer {layer}"
            return _require_finite(parameter(path, layer), where)

        special = write_tokenizer(checkpoint, partial_output, converted.model.max_len)
        values = to_json(converted) | special
        values["torch_dtype"] = reader.dtype("embed/embedding").name
        write_model(partial_output, values, parameter_shapes(converted), checked)
        write_run(partial_output, checkpoint, read_step(checkpoint), converted)
        if not is_whole:
            mean = sum(layer["mean"] for layer in energy) / len(energy)
            report["energy_kept"] = {"mean": mean, "layers": energy}
        if is_calibrated:
            before, report["agreement"] = _compared(model, held_out, partial_output, converted)
            del model  # before another one is loaded
            after = mean_nll(load_model(partial_output, mesh=mesh), held_out)
            report["nll"] = {"before": before, "after": after}
        write_json(partial_output / "convert.json", report)
        form = f"gates factorised with rank {d_low} score"
        if is_whole:
            form = f"the first {score_neurons} neurons of its experts score"
        result = f"the router is gone, and {form}; {convert_summary(report)}"
        command = "python -m aoe_jax.convert"
        origin = made_of(checkpoint, read_step(checkpoint), command, result, "convert.json")
        write_card(partial_output, output.name, values, converted, origin)
    return report


def convert_summary(report):
    """The report of `convert` as a line of text."""
    parts = []
    if "energy_kept" in report:
        parts.append(f"energy kept: {report['energy_kept']['mean']:.4f} of all")
    if "agreement" in report:
        found, nll = report["agreement"], report["nll"]
        layers = ", ".join(f"{share:.3f}" for share in found["layers"])
        by_chance = f"by chance {found['chance']:.3f}"
        parts.append(f"agreement with the router: {found['mean']:.3f} ({by_chance}; {layers})")
        parts.append(f"nll: {nll['before']:.4f} before, {nll['after']:.4f} after")
    return "; ".join(parts)


def _compared(model, batches, directory, converted):
    """The nll of a router MoE, and the report of its agreement with the AoE in a directory."""
    reader, experts = ModelReader(directory, converted), converted.experts

    def w_score(layer):
        if experts.low_rank:
            return reader.layer(_FACTORS[0], layer)
        return reader.layer(_GATE, layer)[..., : experts.score_neurons]

    of_all = np.stack([w_score(layer) for layer in range(converted.model.n_layers)])
    shares, by_chance = agreement(model, batches, of_all, experts.score)
    found = {"mean": float(shares.mean()), "layers": shares.tolist(), "chance": by_chance}
    return mean_nll(model, batches), found


def _factorised(reader, n_layers, d_low):
    """`(parameter, energy)`: a function for `write_model`, which factorises gates, and a list that
    it fills with the energy kept of each layer.
    """
    factors, energy = {}, []  # factors of one layer

    def parameter(path, layer):
        if path not in _FACTORS:
            return reader.layer(path, layer)
        if not factors:
            down, up, kept = _factorise(_gate(reader, layer), d_low)
            factors.update(zip(_FACTORS, (down, up), strict=True))
            mean, least = sum(kept) / len(kept), min(kept)
            energy.append({"mean": mean, "min": least, "experts": kept})
            shown = f"energy kept {mean:.4f}, least of an expert {least:.4f}"
            log.info("layer %d of %d: %s", layer + 1, n_layers, shown)
        return factors.pop(path).astype(reader.dtype(_GATE))

    return parameter, energy


def _reordered(reader, observed, count, score):
    """A function for `write_model`, which puts the neurons that score in front."""
    orders = {}  # of the experts of one layer, [n, f]

    def parameter(path, layer):
        if path not in _NEURONS:
            return reader.layer(path, layer)
        if layer not in orders:
            w_gate = _gate(reader, layer)
            of_layer = (a[layer] for a in observed)
            neurons = telling_neurons(*of_layer, w_gate, count, score)
            orders.clear()
            orders[layer] = np.stack([in_front(own, w_gate.shape[-1]) for own in neurons])
            log.info("layer %d of %d: neurons chosen", layer + 1, len(observed[0]))
        axis = _NEURONS[path]
        order = np.expand_dims(orders[layer], -3 - axis)
        return np.take_along_axis(reader.layer(path, layer), order, axis)

    return parameter


def _converted(config: Config, checkpoint, d_low, score_neurons, score):
    experts, d_model, has = config.experts, config.model.d_model, f"--checkpoint={checkpoint} has"
    if experts.kind != "router" or experts.factorised_gate:
        factorised = "a router with factorised gates"
        what = factorised if experts.kind == "router" else f"experts.kind={experts.kind!r}"
        raise UserError(f"{has} {what}; only a router MoE with whole gates can be converted")
    router = config.routing.name
    if router not in CONVERTIBLE:
        raise UserError(
            f"{has} routing.name={router!r}, which uses its router for more than scores; these can "
            f"be converted: {', '.join(CONVERTIBLE)}"
        )
    width = f"at most the width {experts.d_ffn} of an expert"
    if score_neurons is None:
        wanted = f"must be below d_model={d_model} and {width}"
        require_flag(d_low < d_model and d_low <= experts.d_ffn, "d_low", d_low, wanted)
        changes = {"d_low": d_low, "d_wide": experts.d_ffn}
    else:
        is_within = score_neurons <= experts.d_ffn
        require_flag(is_within, "score_neurons", score_neurons, f"must be {width}")
        changes = {"score_neurons": score_neurons, "score": score}
    return dataclasses.replace(
        config,
        experts=dataclasses.replace(experts, kind="aoe", large_router=False, **changes),
        routing=TopK() if router in ("sparsemixer", "erc") else config.routing,
        balance=dataclasses.replace(config.balance, bias_rate=0.0),  # it goes with the router
        train=dataclasses.replace(config.train, router_steps=0, scoring_rate=1.0),
        mesh=MeshConfig(),
    )


def _gate(reader, layer):
    """The gates of a layer, `[n, d, f]`; raises `UserError` if they are not finite."""
    w_gate = reader.layer(_GATE, layer)
    for expert, w in enumerate(w_gate):
        _require_finite(w, f"the gate of expert {expert} in layer {layer}")
    return w_gate


def _require_finite(array, name):
    for part in np.atleast_1d(array):  # float32 is 10 times as fast as bfloat16
        if not np.isfinite(part.astype(np.float32)).all():
            raise UserError(f"--checkpoint: {name} is not finite; it is damaged")
    return array


def _factorise(w_gate, rank):
    """Truncated singular value decompositions of `w_gate [n, d, f]`, `U S V^T`, in float32.

    Returns `(w_gate_down = U_r S_r [n, d, r], w_gate_up = V_r^T [n, r, f], kept)`, with the share
    of the squares that each expert keeps. `|x w_gate_down|` is the norm of the kept part of
    `x w_gate`.
    """
    n, d, f = w_gate.shape
    w_gate_down, w_gate_up = np.empty((n, d, rank), np.float32), np.empty((n, rank, f), np.float32)
    kept = []
    for expert, w in enumerate(w_gate):
        u, s, v = np.linalg.svd(w.astype(np.float32), full_matrices=False)
        w_gate_down[expert], w_gate_up[expert] = u[:, :rank] * s[:rank], v[:rank]
        squares = s.astype(np.float64) ** 2
        kept.append(float(squares[:rank].sum() / squares.sum()) if squares.any() else 1.0)
    return w_gate_down, w_gate_up, kept

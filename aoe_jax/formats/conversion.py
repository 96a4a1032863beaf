"""Converts a router MoE into an AoE: drops the router and factorises the gates of the experts."""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import as_own
from aoe_jax.formats.reading import RUN_FILE, ModelReader, parameter_shapes, read_config, read_step
from aoe_jax.formats.tokenizer_files import copy_tokenizer
from aoe_jax.formats.writing import new_directory, write_model, write_run
from aoe_jax.json_files import write_json
from aoe_jax.moe.routing import TopK

log = logging.getLogger(__name__)

CONVERTIBLE = ("top_k", "top_p", "expert_choice", "ranked", "sparsemixer", "erc")
_GATE = "layers/experts/w_gate"
_FACTORS = ("layers/experts/w_gate_down", "layers/experts/w_gate_up")


def convert(checkpoint: Path, output: Path, d_low: int):
    """Writes the AoE of a router MoE to `output`, which appears only once it is complete.

    `checkpoint` is a model of the hub or of `aoe_jax.export`, and `d_low` the rank of the gates.
    It converts layer by layer: memory holds the experts of one layer and one file. Factors have the
    dtype of the gates.

    Returns:
      The content of `convert.json` in `output`: `d_low`, `d_wide`, and `energy_kept`, the share of
      the squares of W_gate that its factors keep: `mean`, and `mean`, `min` and `experts` by layer.

    Raises:
      UserError: the checkpoint can't be read or has no whole gates, `d_low` is too large, or
        `output` exists or can't be written.
    """
    config = read_config(checkpoint)
    converted = _converted(config, checkpoint, d_low)
    reader = ModelReader(checkpoint, config)
    if "selection_bias" in reader.routing_state:
        log.warning(
            "the selection bias of loss-free balancing goes with the router: it was made for its "
            "logits"
        )
    if config.routing.name == "sparsemixer":
        log.warning("routing.name='sparsemixer' is made for logits around 0; the AoE has 'top_k'")
    factors, energy = {}, []  # factors of one layer; energy kept of each layer so far

    def parameter(path, layer):
        if path not in _FACTORS:
            return reader.layer(path, layer)
        if not factors:
            down, up, kept = _factorise(reader.layer(_GATE, layer), d_low, layer)
            factors.update(zip(_FACTORS, (down, up), strict=True))
            mean, least = sum(kept) / len(kept), min(kept)
            energy.append({"mean": mean, "min": least, "experts": kept})
            shown = f"energy kept {mean:.4f}, least of an expert {least:.4f}"
            log.info("layer %d of %d: %s", layer + 1, config.model.n_layers, shown)
        return factors.pop(path).astype(reader.dtype(_GATE))

    with new_directory(output) as partial_output:
        values = as_own(converted) | copy_tokenizer(checkpoint, partial_output)
        values["torch_dtype"] = reader.dtype("embed/embedding").name
        write_model(partial_output, values, parameter_shapes(converted), parameter)
        mean = sum(layer["mean"] for layer in energy) / len(energy)
        report = {
            "d_low": d_low,
            "d_wide": converted.experts.d_wide,
            "energy_kept": {"mean": mean, "layers": energy},
        }
        write_json(partial_output / "convert.json", report)
        if (checkpoint / RUN_FILE).exists():
            write_run(partial_output, checkpoint, read_step(checkpoint), converted)
    return report


def _converted(config: Config, checkpoint, d_low):
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
    if d_low >= d_model or d_low > experts.d_ffn:
        wanted = f"below d_model={d_model} and at most the width {experts.d_ffn} of an expert"
        raise UserError(f"--d_low={d_low}: must be {wanted}")
    return dataclasses.replace(
        config,
        experts=dataclasses.replace(
            experts, kind="aoe", d_low=d_low, d_wide=experts.d_ffn, large_router=False
        ),
        routing=TopK() if router in ("sparsemixer", "erc") else config.routing,
        balance=dataclasses.replace(config.balance, bias_rate=0.0),  # it goes with the router
        train=dataclasses.replace(config.train, router_steps=0),
        mesh=MeshConfig(),
    )


def _factorise(w_gate, rank, layer):
    """Truncated singular value decompositions of `w_gate [n, d, f]`, in float32.

    Returns:
      `(w_gate_down [n, d, r], w_gate_up [n, r, f], kept)`, with the share of the squares that each
      expert keeps.
    """
    n, d, f = w_gate.shape
    w_gate_down, w_gate_up = np.empty((n, d, rank), np.float32), np.empty((n, rank, f), np.float32)
    kept = []
    for expert, w in enumerate(w_gate):
        w = w.astype(np.float32)
        if not np.isfinite(w).all():
            where = f"the gate of expert {expert} in layer {layer}"
            raise UserError(f"--checkpoint: {where} isn't finite; it is damaged")
        u, s, v = np.linalg.svd(w, full_matrices=False)
        w_gate_down[expert], w_gate_up[expert] = u[:, :rank] * s[:rank], v[:rank]
        squares = s.astype(np.float64) ** 2
        kept.append(float(squares[:rank].sum() / squares.sum()) if squares.any() else 1.0)
    return w_gate_down, w_gate_up, kept

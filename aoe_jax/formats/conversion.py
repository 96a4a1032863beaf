"""A router MoE turned into an AoE: the router goes, the gates of the experts are factorised."""

import dataclasses
import logging
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.config import Config, MeshConfig
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import as_own
from aoe_jax.formats.reading import RUN_FILE, ModelReader, parameter_shapes, read_config, read_step
from aoe_jax.formats.tokenizer_files import copy_tokenizer
from aoe_jax.formats.writing import new_directory, write_model
from aoe_jax.json_files import read_json, write_json

log = logging.getLogger(__name__)

REPORT = "convert.json"
_GATE = "layers/experts/w_g"
_FACTORS = ("layers/experts/w_down", "layers/experts/w_up")


def convert(checkpoint: Path, output: Path, d_low: int):
    """Writes the AoE of a router MoE to `output`, which comes into being only when it is complete.

    Layer by layer, so that memory holds little more than the experts of one. Factors have the dtype
    of the gates.

    Args:
      checkpoint: a directory with `config.json` and safetensors files, of the hub or of
        `aoe_jax.export`.
      output: a directory that doesn't exist.
      d_low: rank of the factorised gates.

    Returns:
      What `convert.json` in `output` holds: `d_low`, `d_wide`, and `energy_kept`, the share of the
      squares of Wg that its factors keep: `mean` over all, and for each of `layers` `mean`, `min`
      and all `experts`.

    Raises:
      UserError: the checkpoint can't be read or has no whole gates to factorise, `d_low` can't be,
        or `output` exists or can't be written.
    """
    config = read_config(checkpoint)
    converted = _converted(config, checkpoint, d_low)
    reader = ModelReader(checkpoint, config)
    factors, shapes = _Factors(reader, d_low), parameter_shapes(converted)
    dtypes = {path: reader.dtype(_GATE if path in _FACTORS else path) for path in shapes}
    if "selection_bias" in reader.routing_state:
        log.warning(
            "the selection bias of loss-free balancing goes with the router: it was made for its logits"
        )
    if config.experts.gate != converted.experts.gate:
        log.warning(
            "experts.gate=%r was made for logits around 0; the AoE has %r", "sparsemixer", "chosen"
        )

    def parameter(path, layer):
        if path in _FACTORS:
            return factors.of_layer(layer)[path].astype(dtypes[path])
        return reader.layer(path, layer)

    tokens = read_json(checkpoint / "config.json")
    values = as_own(converted) | {
        name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    with new_directory(output) as partial_output:
        write_model(partial_output, values, shapes, parameter, dtypes)
        report = {
            "d_low": d_low,
            "d_wide": converted.experts.d_wide,
            "energy_kept": factors.energy_kept(),
        }
        write_json(partial_output / REPORT, report)
        copy_tokenizer(checkpoint, partial_output)
        if (checkpoint / RUN_FILE).exists():
            run = {"step": read_step(checkpoint), "config": converted.to_dict()}
            write_json(partial_output / RUN_FILE, run)
            if (checkpoint / "data.json").exists():
                shutil.copyfile(checkpoint / "data.json", partial_output / "data.json")
    return report


def _converted(config: Config, checkpoint, d_low):
    """The configuration of the AoE."""
    experts, d_model = config.experts, config.model.d_model
    if experts.kind != "router" or experts.factorised_gate:
        what = (
            "a router with factorised gates"
            if experts.factorised_gate
            else f"experts.kind={experts.kind!r}"
        )
        raise UserError(
            f"--checkpoint={checkpoint} has {what}; only a router MoE with whole gates can be converted"
        )
    if config.method_name:
        what = f"chooses its experts by {config.method_name}, which goes by its router in more than scores; only others"
        raise UserError(f"--checkpoint={checkpoint} {what} can be converted")
    if d_low >= d_model or d_low > experts.d_ffn:
        wanted = (
            f"must be below d_model={d_model} and at most the width {experts.d_ffn} of an expert"
        )
        raise UserError(f"--d_low={d_low}: {wanted}")
    experts = experts.choosing(
        kind="aoe",
        d_low=d_low,
        d_wide=experts.d_ffn,
        large_router=False,
        gate="chosen" if experts.gate == "sparsemixer" else experts.gate,
    )
    train = dataclasses.replace(config.train, router_steps=0)
    # What was for the router: its loss, and a bias that starts anew where training asks for one
    # again.
    balance = dataclasses.replace(
        config.balance, bias_rate=0.0, coupling_weight=0.0, coupling_alpha=1.0
    )
    return dataclasses.replace(
        config, experts=experts, balance=balance, train=train, mesh=MeshConfig()
    )


class _Factors:
    """The factorised gates, those of one layer at a time."""

    def __init__(self, reader, d_low):
        self._reader, self._d_low = reader, d_low
        self._layer, self._factors, self._kept = None, None, []

    def of_layer(self, layer):
        """`w_down [n, d, r]` and `w_up [n, r, f]` float32 by the paths of the parameters; layers
        come in order.
        """
        if layer != self._layer:
            self._factors = None  # the last layer's needn't lie beside this one's
            self._factors = self._factorise(self._reader.layer(_GATE, layer))
            self._layer = layer
        return self._factors

    def _factorise(self, w_g):
        n, d, f = w_g.shape
        w_down, w_up = (
            np.empty((n, d, self._d_low), np.float32),
            np.empty((n, self._d_low, f), np.float32),
        )
        kept = []
        for expert in range(n):
            w_down[expert], w_up[expert], share = jax.device_get(
                _truncated(w_g[expert], self._d_low)
            )
            kept.append(float(share))
            if not math.isfinite(kept[-1]):
                raise UserError(
                    f"--checkpoint: the gate of expert {expert} in layer {len(self._kept)} isn't finite; it is damaged"
                )
        self._kept.append({"mean": sum(kept) / n, "min": min(kept), "experts": kept})
        log.info(
            "layer %d of %d: energy kept %.4f, least of an expert %.4f",
            len(self._kept),
            self._reader.shapes[_GATE][0],
            sum(kept) / n,
            min(kept),
        )
        return dict(zip(_FACTORS, (w_down, w_up), strict=True))

    def energy_kept(self):
        """See `convert`; once all layers are done."""
        return {
            "mean": sum(layer["mean"] for layer in self._kept) / len(self._kept),
            "layers": self._kept,
        }


@partial(jax.jit, static_argnums=1)
def _truncated(w, rank):
    """`(U_r S_r, V_r^T, share of the squares that they keep)` of `w [d, f]`, decomposed in float32."""
    u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    energy = jnp.sum(s**2)
    kept = jnp.where(energy == 0, 1.0, jnp.sum(s[:rank] ** 2) / jnp.where(energy == 0, 1, energy))
    return u[:, :rank] * s[:rank], v[:rank], kept

"""What a run would need on machines that aren't here: `python -m aoe_jax.plan
--config=FILE[:VARIANT] --topology=v5p:4x4x4`.

The real train step is compiled for the named TPU slices, `--topology=GENERATION:SHAPE
[--slices=N]`, with `libtpu` from its wheel, or for GPUs of one node, `--topology=h100:8`, with
JAX's CUDA wheels. It reports parameters, memory per device against the chip's, FLOPs, what is
communicated, and from public peak figures a bound on step time and model FLOPs utilisation (MFU).
Any `--config.GROUP.FIELD=VALUE` works as in training; `--json=FILE` writes the report. Exit status
3: it doesn't fit. `--suggest` then tries other meshes, the nearest first.

How the figures come about:

- Memory is the compiler's: arguments (state and batch), results, and temporary memory, per device.
- FLOPs are the compiler's. It counts the body of a loop once, so the layers and the chunks of the
  loss are multiplied by their number; further rounds of expert parallelism
  (`experts/transport.py`), which balanced loads don't need, are left out.
- Collectives are those of the program before it is compiled, where all are explicit but the sums of
  a few scalars and of the gradients of norm scales; what is gathered twice in one body of a loop
  counts once. Bytes are what a device receives in a step, by the usual ring algorithms.
- The step time is bounded by the slowest of arithmetic, HBM (state and activations read and written
  once) and network, each at its peak and perfectly overlapped: no run is faster.
"""

import dataclasses
import itertools
import json
import logging
import math
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from aoe_jax import cli
from aoe_jax.communication import collectives
from aoe_jax.config import Config, MeshConfig
from aoe_jax.counts import parameter_counts, training_flops_per_token
from aoe_jax.errors import UserError
from aoe_jax.experts import transport
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.hardware import CHIPS, count_chips
from aoe_jax.model.loss import CHUNK_TOKENS
from aoe_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    fill_mesh,
    make_mesh,
    replicated,
    state_shardings,
    with_shardings,
)
from aoe_jax.topology import compiling_for, topology_devices
from aoe_jax.training.step import init_state, make_train_step, training_loss

log = logging.getLogger(__name__)

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "GENERATION:SHAPE, such as v5p:4x4x4, v5e:16x16 or h100:8"
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape", lower_bound=1)
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "where it doesn't fit, look for the nearest mesh that does"
)
_JSON = flags.DEFINE_string("json", None, "a file for the report")

SUGGESTIONS = 6  # meshes that --suggest compiles at most


def _bytes_per_device(abstract):
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )


def abstract_batch(config, n_rows, sharding=None):
    """The shapes of a batch of that many sequences."""
    dtypes = {
        "inputs": jnp.int32,
        "targets": jnp.int32,
        "segment_ids": jnp.int32,
        "weights": jnp.float32,
    }
    shape = (n_rows, config.data.seq_len)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }


def train_step_for(config, mesh):
    """`(step, state, batch)` for the mesh in context: the jitted train step, and the shapes that it
    takes.
    """
    state = jax.eval_shape(lambda: init_state(config, 0))
    shardings = state_shardings(mesh, state)
    step = jax.jit(
        make_train_step(config), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    )
    batch = abstract_batch(config, config.train.batch_size, batch_sharding(mesh))
    return step, with_shardings(state, shardings), batch


def _activation_bytes(config, n_devices):
    """What the forward pass of a micro-batch keeps for the backward pass, per device: all but
    parameters and batch.
    """
    state = jax.eval_shape(lambda: init_state(config, 0))
    batch = abstract_batch(config, config.train.batch_size // config.train.accumulate)

    def kept(params, routing_state, batch, key):
        return jax.vjp(
            lambda p: training_loss(config, p, routing_state, batch, key), params, has_aux=True
        )[1]

    key = jax.eval_shape(
        lambda: jax.random.key(0)
    )  # a shape, as all else: nothing runs on these devices
    leaves = jax.tree.leaves(jax.eval_shape(kept, state.params, state.routing_state, batch, key))
    parameters = {(a.shape, a.dtype) for a in jax.tree.leaves(state.params)}
    return (
        sum(a.size * a.dtype.itemsize for a in leaves if (a.shape, a.dtype) not in parameters)
        / n_devices
    )


def plan(config: Config, generation, devices, compiles=True):
    """Compiles the train step of `config`, whose mesh is filled in, for devices of a topology.

    Without `compiles` it is only traced, in seconds: memory, compiled FLOPs and whether it fits are
    then unknown, None.

    Returns:
      A dict, see `--json`: `fits`, `parameters`, `tokens_per_step`, `mesh`, `hbm_bytes`,
      `memory_bytes` {`state`, `activations`, `temp`, `total`}, `flops` {`compiled`, `useful`},
      `collective_bytes` by kind, `collectives` by kind and mesh axes, `step_seconds`, `bound_by`,
      `mfu_bound`, `compile_seconds`. Bytes and FLOPs are per device.
    """
    chip, n_devices = CHIPS[generation], len(devices)
    share = count_chips(devices) / n_devices  # of a chip that is a device
    hbm_bytes = share * chip.hbm_bytes
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh), compiling_for(devices):
        step, state, batch = train_step_for(config, mesh)
        traced = step.trace(state, batch)
        sizes = dict(zip(MESH_AXES, mesh.devices.shape, strict=True))
        found = {key: v for key, v in collectives(traced.jaxpr.jaxpr, sizes).items() if v[1]}
        started = time.perf_counter()
        error, compiled, flops = None, None, None
        try:
            compiled = traced.lower().compile() if compiles else None
        except jax.errors.JaxRuntimeError as e:
            error = str(e)
            if _used_bytes(error) is None:
                raise
        compile_seconds = time.perf_counter() - started
        memory = {
            "state": _bytes_per_device(state),
            "activations": _activation_bytes(config, n_devices),
        }
        memory |= {"temp": None, "total": _used_bytes(error) if error else None}
        if compiled:
            analysis = compiled.memory_analysis()
            memory["temp"] = analysis.temp_size_in_bytes
            memory["total"] = (
                analysis.argument_size_in_bytes
                + analysis.output_size_in_bytes
                - analysis.alias_size_in_bytes
                + analysis.temp_size_in_bytes
            )
            flops = _compiled_flops(config, compiled, step, state, batch, n_devices)
    tokens = config.tokens_per_step
    useful = tokens * training_flops_per_token(config) / n_devices
    received = {}
    for (kind, _), (_, size) in found.items():
        received[kind] = received.get(kind, 0) + size
    across = 0.0  # the data axis is the outermost: with several slices, it is the one between them
    if len({getattr(d, "slice_index", 0) or 0 for d in devices}) > 1:
        across = sum(size for (_, axes), (_, size) in found.items() if "data" in axes)
    seconds = {
        "arithmetic": (flops or useful) / (share * chip.flops),
        "network": (sum(received.values()) - across) / (share * chip.link_bandwidth)
        + across / (share * chip.slice_bandwidth),
        "HBM": 2
        * (memory["state"] + config.train.accumulate * memory["activations"])
        / (share * chip.hbm_bandwidth),
    }
    bound_by = max(seconds, key=seconds.get)
    return {
        "fits": None if not compiles else error is None and memory["total"] <= hbm_bytes,
        "generation": generation,
        "devices": n_devices,
        "mesh": {**sizes, "transport": config.mesh.transport},
        "unroll": config.model.unroll,
        "parameters": parameter_counts(config).total,
        "active_parameters": parameter_counts(config).active,
        "tokens_per_step": tokens,
        "hbm_bytes": hbm_bytes,
        "memory_bytes": memory,
        "flops": {"compiled": flops, "useful": useful},
        "collective_bytes": received,
        "collectives": [
            {"kind": kind, "axes": list(axes), "count": count, "bytes": size}
            for (kind, axes), (count, size) in sorted(found.items())
        ],
        "seconds": seconds,
        "step_seconds": seconds[bound_by],
        "bound_by": bound_by,
        "mfu_bound": useful / (share * chip.flops) / seconds[bound_by],
        "compile_seconds": compile_seconds,
    }


def _used_bytes(error):
    """What the compiler says that a program needs of the chip's memory, where it refuses it for
    that; else None.
    """
    found = re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        error,
    )
    if not found:
        return None
    size, unit = (group for group in found.groups() if group)
    return float(size) * 1024 ** ("KMGT".index(unit) + 1)


def _compiled_flops(config, compiled, step, state, batch, n_devices):
    """FLOPs of a device in a step, with every loop counted as often as it runs; None where the
    compiler counts none.
    """
    if config.mesh.expert > 1 or not SELECTIONS[config.experts.selection].all_slots_used:
        with transport.first_round_only():
            compiled = step.lower(state, batch).compile()
    counted = (compiled.cost_analysis() or {}).get("flops")
    if not counted:
        return None
    passes = LAYERS[
        config.experts.kind
    ].passes  # a loop too, but for the loss, which is of all at once
    tokens = config.tokens_per_step // config.train.accumulate // n_devices
    per_token = 6 * config.model.vocab_size * config.model.d_model
    chunk = min(CHUNK_TOKENS, tokens)
    update = (
        20 * parameter_counts(config).total / (n_devices // config.mesh.data)
    )  # AdamW's arithmetic, about
    n_layers, unroll = config.model.n_layers, min(config.model.unroll, config.model.n_layers)
    in_program = unroll + n_layers % unroll  # the body of the scan, and the layers left over
    layer = (counted - passes * chunk * per_token - update) / in_program
    return config.train.accumulate * passes * (n_layers * layer + tokens * per_token) + update


def candidates(config: Config, n_devices):
    """Other meshes that the configuration allows, the nearest first: few factors moved, tensor and
    expert last.
    """
    factors = [f for f in range(1, n_devices + 1) if n_devices % f == 0]
    given = [getattr(config.mesh, axis) for axis in MESH_AXES]
    found = []
    for fsdp, expert, tensor in itertools.product(factors, repeat=3):
        if n_devices % (fsdp * expert * tensor) or (config.experts.kind == "dense" and expert > 1):
            continue
        shape = (n_devices // (fsdp * expert * tensor), fsdp, expert, tensor)
        transport = "all_to_all" if config.experts.kind == "capacity" else config.mesh.transport
        mesh = MeshConfig(*shape, transport=transport if expert > 1 else "ring")
        model = dataclasses.replace(config.model, unroll=config.model.unroll if fsdp == 1 else 1)
        try:
            changed = dataclasses.replace(config, mesh=mesh, model=model)
        except UserError:
            continue
        distance = sum(
            abs(math.log2(a / b)) * w for a, b, w in zip(shape, given, (1, 1, 1.5, 2), strict=True)
        )
        if list(shape) != given:
            found.append((distance, shape, changed))
    return [changed for _, _, changed in sorted(found, key=lambda entry: entry[:2])]


def suggest(config: Config, generation, devices):
    """The plan of the nearest mesh that fits, or None; compiles up to `SUGGESTIONS` of them.

    Only meshes that split the state further are tried, since the batch is split over all but tensor
    in any case.
    """
    shards = config.mesh.fsdp * config.mesh.expert * config.mesh.tensor
    tried = 0
    for changed in candidates(config, len(devices)):
        if changed.mesh.fsdp * changed.mesh.expert * changed.mesh.tensor <= shards:
            continue
        tried += 1
        log.info(
            "trying %s", ", ".join(f"{axis} {getattr(changed.mesh, axis)}" for axis in MESH_AXES)
        )
        report = plan(changed, generation, devices)
        if report["fits"] or tried == SUGGESTIONS:
            return report if report["fits"] else None
    return None


def table(report):
    """The report in words."""

    def gigabytes(size):
        return "unknown" if size is None else f"{size / 1e9:.2f} GB"

    memory, flops = report["memory_bytes"], report["flops"]
    mesh = ", ".join(f"{name} {value}" for name, value in report["mesh"].items())
    mesh += f"; model.unroll {report['unroll']}" if report["unroll"] > 1 else ""
    compiled = (
        "not counted"
        if flops["compiled"] is None
        else f"{flops['compiled'] / flops['useful']:.3f} of useful"
    )
    lines = [
        f"{report['devices']} devices of {report['generation']}: {mesh}",
        f"parameters      {report['parameters'] / 1e6:,.0f}M, {report['active_parameters'] / 1e6:,.0f}M active; "
        f"{report['tokens_per_step']:,} tokens a step",
        f"memory          {gigabytes(memory['total'])} of {gigabytes(report['hbm_bytes'])} a device: state "
        f"{gigabytes(memory['state'])}, temporary {gigabytes(memory['temp'])} (kept activations about "
        f"{gigabytes(memory['activations'])})",
        f"FLOPs           {flops['useful'] / 1e12:.2f}T useful a device and step; compiled {compiled}",
        *(
            f"{entry['kind']:<15} {entry['count']:6} over {'+'.join(entry['axes'])}: {gigabytes(entry['bytes'])} received"
            for entry in report["collectives"]
        ),
        f"step            at least {report['step_seconds']:.3f} s, bound by {report['bound_by']} ("
        + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in report["seconds"].items())
        + f"); MFU at most {report['mfu_bound']:.2f}",
        f"compiled in     {report['compile_seconds']:.0f} s",
        "fits" if report["fits"] else "DOES NOT FIT",
    ]
    return "\n".join(lines)


def main():
    """Plans, prints, and exits with 3 where it doesn't fit."""
    config = cli.parsed_config(_CONFIG)
    topology = cli.required(_TOPOLOGY)
    generation, devices = topology_devices(topology, _SLICES.value)
    config = fill_mesh(config, len(devices))
    report = plan(config, generation, devices)
    print(table(report))
    if not report["fits"] and _SUGGEST.value:
        better = suggest(config, generation, devices)
        report["suggestion"] = better
        print(
            "\nno other mesh was found to fit"
            if better is None
            else f"\nthis mesh fits:\n{table(better)}"
        )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["fits"] else 3


if __name__ == "__main__":
    cli.run(main)

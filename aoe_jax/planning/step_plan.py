"""Estimates a run on devices that this machine lacks; the command is `python -m aoe_jax.plan`.

How the figures are computed:

- Memory is the compiler's figure per device: arguments (state and batch), results, temporaries.
- `aoe_jax/planning/costs.py` computes FLOPs and memory traffic from the optimised program.
- Collectives are counted in the jaxpr, which has all of them except the sums of a few scalars and
  of the gradients of norm scales. Their bytes are those that a device receives in a step with ring
  algorithms. The collectives of the optimised program are also listed, with the bytes of the
  operand or of the result, whichever are more.
- The lower bound of the step time is the longest of three times: arithmetic, HBM (the state is read
  and written once) and network, each at its published peak.
- The likely step time is the sum of `costs.seconds` over all operations. For collectives, this is
  only the time that does not overlap with other operations. Two other estimates are beside it: all
  operations at the peaks, and by the compiler's cycles.
- The count of operations leaves out collectives. Those without products are those without FLOPs,
  so kernels of unknown cost are among them.
"""

import logging
import math
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp

from aoe_jax import sharding
from aoe_jax.config.run import Config
from aoe_jax.model.counts import in_words, parameter_counts, training_flops_per_token
from aoe_jax.moe.transports import ROW_BUFFER
from aoe_jax.planning import costs
from aoe_jax.planning.communication import collectives
from aoe_jax.planning.hardware import chip_part, compiling_for, count_parts, slice_shape
from aoe_jax.planning.hlo import compile_and_read
from aoe_jax.planning.kernel_costs import KERNEL_COSTS
from aoe_jax.training.step import train_step_on

log = logging.getLogger(__name__)

LIKELY = ("hbm_traffic_bytes", "likely_step_seconds", "seconds_by_scope", "seconds_at_peaks")
LIKELY += ("seconds_by_cycles", "operations", "without_products", "compiled_collectives")


def abstract_batch(config, split=None):
    """Returns the shapes and dtypes of a batch."""
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    return {"inputs": tokens, "targets": tokens, "segment_ids": tokens, "weights": weights}


def plan(config: Config, generation, devices):
    """Compiles the training step of a configuration for the devices of a topology.

    `generation` is a key of `hardware.CHIPS`. Returns the dict that `--json` writes. Bytes and
    FLOPs are per device and step. `likely_mfu` and the keys in `LIKELY` are None without HLO.
    """
    n_devices, chip = len(devices), chip_part(generation, devices)
    config, n_parts = sharding.fill_mesh(config, n_devices), count_parts(devices)
    config.mesh.check_parts(n_parts)
    mesh = sharding.make_mesh(config, devices)
    with jax.set_mesh(mesh), compiling_for(devices):
        step, state = train_step_on(mesh, config)
        batch = abstract_batch(config, sharding.batch_sharding(mesh))
        traced = step.trace(state, batch)
        log.info("compiling the training step for %d devices", n_devices)
        started = time.perf_counter()
        total, temp, text = _compile(traced)
        compile_seconds = time.perf_counter() - started
    memory = {"state": _bytes_per_device(state), "temp": temp, "total": total}
    choice = config.routing.choice(config.experts)
    is_fixed = choice is None or choice.is_fixed
    # Buffers of `moe.transports` are larger than balanced loads need.
    is_exact = n_devices == 1 or (mesh.shape["expert"] == 1 and is_fixed)
    used = 1 if is_exact else 1 / ROW_BUFFER
    likely = read_program(text, chip, slice_shape(devices), used=used) if text else None
    if temp is not None and not text:
        log.warning("the compiler wrote no program, so FLOPs and likely step time are unknown")
    found, received = [], Counter()
    for (kind, axes), (count, size) in sorted(collectives(traced.jaxpr.jaxpr, mesh.shape).items()):
        if size:
            found.append({"kind": kind, "axes": list(axes), "count": count, "bytes": size})
            received[kind] += size
    # Bytes between slices or nodes, along the mesh axis data. Each part first reduces
    # or gathers among its own devices. So a device of a group of n receives (parts - 1) / (n - 1)
    # of its bytes from other parts.
    across = 0.0
    for entry in found if n_parts > 1 else ():
        if "data" in entry["axes"]:
            n = math.prod(mesh.shape[axis] for axis in entry["axes"])
            across += entry["bytes"] * (n_parts - 1) / (n - 1)
    within = received.total() - across
    if likely and across:  # `read_program` assumed the bandwidth within a slice
        for name in ("likely_step_seconds", "seconds_at_peaks", "seconds_by_cycles"):
            likely[name] += across / chip.slice_bandwidth
        by_scope = likely["seconds_by_scope"]
        by_scope["network"] = by_scope.get("network", 0) + across / chip.slice_bandwidth
    flops = likely and likely.pop("flops")
    useful = config.tokens_per_step * training_flops_per_token(config) / n_devices
    seconds = {
        "arithmetic": (flops or useful) / chip.flops,
        "network": within / chip.link_bandwidth + across / chip.slice_bandwidth,
        "HBM": 2 * memory["state"] / chip.hbm_bandwidth,
    }
    bound_by, counts = max(seconds, key=seconds.get), parameter_counts(config)
    return {
        "fits": temp is not None and total <= chip.hbm_bytes,
        "generation": generation,
        "devices": n_devices,
        "mesh": {**mesh.shape, "transport": config.mesh.transport},
        "parameters": counts.total,
        "active_parameters": counts.active,
        "tokens_per_step": config.tokens_per_step,
        "hbm_bytes": chip.hbm_bytes,
        "memory_bytes": memory,
        "flops": {"compiled": flops, "useful": useful},
        "collective_bytes": dict(received),
        "collectives": found,
        "seconds": seconds,
        "step_seconds": seconds[bound_by],
        "bound_by": bound_by,
        "mfu_bound": useful / chip.flops / seconds[bound_by],
        "compile_seconds": compile_seconds,
        **(likely or dict.fromkeys(LIKELY)),
        "likely_mfu": likely and useful / chip.flops / likely["likely_step_seconds"],
    }


def _bytes_per_device(abstract):
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )


def _compile(traced):
    """Returns `(bytes, temporary bytes, HLO)`; the last two are None if the memory is too small."""
    try:
        compiled, text = compile_and_read(traced.lower())
    except jax.errors.JaxRuntimeError as e:
        size = r"([\d.]+)([KMGT])"
        found = re.search(rf"\({size}\) exceeds available HBM|Used {size} of .* hbm", str(e))
        if not found:
            raise
        number, unit = filter(None, found.groups())
        return float(number) * 1024 ** ("KMGT".index(unit) + 1), None, None
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return used, memory.temp_size_in_bytes, text


def read_program(text, chip, shape, kernel_costs=KERNEL_COSTS, used=1.0):
    """Returns a dict with `flops` and the keys in `LIKELY` for one step.

    `text` is from `hlo.compile_and_read`, `chip` is the `hardware.Chip` of a device, `shape` is
    from `hardware.slice_shape`, and the other arguments are those of `costs.Program`.
    """
    operations = costs.Program(text, kernel_costs, used, chip.matrix_unit).operations
    kernels = (o for o in operations if o.opcode == "tpu_custom_call" and not o.flops)
    if unknown := sorted({re.sub(r"[.\d]+$", "", o.name) for o in kernels}):
        log.warning("FLOPs are unknown, only operands and results count: %s", ", ".join(unknown))
    totals, by_scope, counts, sent = Counter(), Counter(), Counter(), Counter()
    simple = [o for o in operations if not (o.collective or o.flops)]
    for o in operations:
        if o.collective:
            counts[o.collective, o.is_async] += o.times
            sent[o.collective, o.is_async] += o.times * o.sent_bytes
        for estimate in costs.ESTIMATES:
            seconds = o.times * costs.seconds(o, chip, shape, estimate)
            totals[estimate] += seconds
            by_scope[costs.scope(o)] += seconds * (estimate == "likely")
    at_peaks = sum(o.times * costs.seconds(o, chip, shape, "peaks") for o in simple)
    return {
        "flops": sum(o.times * o.flops for o in operations),
        "hbm_traffic_bytes": sum(o.times * o.hbm_bytes for o in operations),
        "likely_step_seconds": totals["likely"],
        "seconds_by_scope": dict(by_scope.most_common()),
        "seconds_at_peaks": totals["peaks"],
        "seconds_by_cycles": totals["cycles"],
        "operations": sum(o.times for o in operations if not o.collective),
        "without_products": {
            "operations": sum(o.times for o in simple),
            "seconds_at_peaks": at_peaks,
        },
        "compiled_collectives": [
            {"kind": kind, "is_async": is_async, "count": count, "bytes": sent[kind, is_async]}
            for (kind, is_async), count in sorted(counts.items())
        ],
    }


def table(report):
    """Formats the result of `plan` as lines of text."""

    def gigabytes(size):
        return "unknown" if size is None else f"{size / 1e9:.{2 if size >= 1e7 else 5}f} GB"

    flops, likely = report["flops"], report["likely_step_seconds"]
    mesh = ", ".join(f"{name} {value}" for name, value in report["mesh"].items())
    ratio = flops["compiled"] and f"{flops['compiled'] / flops['useful']:.3f} of useful"
    seconds = ", ".join(f"{name} {value:.3f} s" for name, value in report["seconds"].items())
    sizes = {name: gigabytes(size) for name, size in report["memory_bytes"].items()}
    rows = [
        f"{report['devices']} devices of {report['generation']}: {mesh}",
        f"parameters      {in_words(report['parameters'])}, of which "
        f"{in_words(report['active_parameters'])} are active (embeddings count twice); "
        f"{report['tokens_per_step']:,} tokens a step",
        f"memory          {sizes['total']} of {gigabytes(report['hbm_bytes'])} a device: state "
        f"{sizes['state']}, temporary {sizes['temp']}",
        f"FLOPs           {flops['useful'] / 1e12:.2f}T useful a device and step; compiled "
        f"{ratio or 'not counted'}",
        f"step            at least {report['step_seconds']:.3f} s, bound by {report['bound_by']} "
        f"({seconds}); MFU at most {report['mfu_bound']:.2f}",
        f"compiled in     {report['compile_seconds']:.0f} s",
    ]
    if likely:
        parts, simple = report["seconds_by_scope"].items(), report["without_products"]
        by_scope = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in parts)
        rows.append(
            f"likely step     {likely:.3f} s, MFU {report['likely_mfu']:.2f}; at the peaks "
            f"{report['seconds_at_peaks']:.3f} s, by cycles {report['seconds_by_cycles']:.3f} s; "
            f"{gigabytes(report['hbm_traffic_bytes'])} of HBM traffic; in ms: {by_scope}"
        )
        rows.append(
            f"operations      {report['operations']:,.0f}; those without products are "
            f"{simple['operations']:,.0f} and take {simple['seconds_at_peaks']:.3f} s at HBM's peak"
        )
    for entry in report["collectives"]:
        what = f"{entry['count']:6} over {'+'.join(entry['axes'])}"
        rows.append(f"{entry['kind']:<15} {what}: {gigabytes(entry['bytes'])} received")
    for entry in report["compiled_collectives"] or ():
        name = entry["kind"] + (" (async)" if entry["is_async"] else "")
        rows.append(f"compiled: {name} {entry['count']:.0f}: {gigabytes(entry['bytes'])}")
    return "\n".join([*rows, "fits" if report["fits"] else "DOES NOT FIT"])

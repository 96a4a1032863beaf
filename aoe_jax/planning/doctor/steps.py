"""Training steps of a configuration and its twin on random tokens, beside their plan."""

import dataclasses
import logging
import math
import statistics
import time

import jax

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.counts import parameter_counts, training_flops_per_token
from aoe_jax.planning.hardware import GENERATIONS
from aoe_jax.planning.plan import plan
from aoe_jax.sharding import fill_mesh
from aoe_jax.training.devices import device_memory
from aoe_jax.training.step_times import RepeatedStep

log = logging.getLogger(__name__)

STEPS = 10
MAX_TOKENS = 16_384  # of a device in a step


def fitted(config: Config, n_devices):
    """The configuration for all devices, in one micro-batch of at most `MAX_TOKENS` a device."""
    config = fill_mesh(config, n_devices)
    shards, train = math.prod(config.mesh.shape[:3]), config.train
    sequences = train.batch_size // train.accumulate // shards
    sequences = min(sequences, max(1, MAX_TOKENS // config.data.seq_len))
    train = dataclasses.replace(train, batch_size=sequences * shards, accumulate=1)
    return dataclasses.replace(config, train=train)


def twins(config: Config):
    """AoE and the router MoE of equal total parameters (Eq. 5), `{"aoe": Config, "moe": Config}`.

    One of them is the configuration. The AoE of a router has `d_low = d / 4`, and a width that GPU
    kernels take; the router takes L_aux from all tokens. A configuration of another kind, or on a
    mesh that does not divide its twin, is alone: `{kind: Config}`.
    """
    e, replace = config.experts, dataclasses.replace
    try:
        if e.kind == "aoe":
            of_aoe = {"score_gradient": None, "score_neurons": None, "score": "norm"}
            router = replace(e, kind="router", d_wide=None, round_to=1, **of_aoe)
            balance = replace(config.balance, aux_tokens=1.0)
            return {"aoe": config, "moe": replace(config, experts=router, balance=balance)}
        if e.kind == "router" and not (e.factorised_gate or e.large_router):
            round_to = 64 if e.d_ffn >= 1024 else config.mesh.tensor
            aoe = replace(e, kind="aoe", d_low=config.model.d_model // 4, round_to=round_to)
            return {"aoe": replace(config, experts=aoe), "moe": config}
    except UserError as refusal:
        log.warning("the configuration has no twin: %s", refusal)
    return {e.kind: config}


def run_steps(config: Config, peak):
    """Takes `STEPS` steps; `peak` are FLOPs per second of a device, for the MFU.

    `step_seconds` is the median; `memory_bytes` are `devices.program_memory` and, where the backend
    counts it, the peak of this process; `finite` is whether every step was.
    """
    started = time.perf_counter()
    step = RepeatedStep(config)
    jax.block_until_ready(step())
    compile_seconds, seconds, finite = time.perf_counter() - started, [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        metrics = jax.block_until_ready(step())
        seconds.append(time.perf_counter() - started)
        finite.append(bool(metrics["finite"]))
    median, tokens = statistics.median(seconds), config.tokens_per_step
    flops = tokens * training_flops_per_token(config) / jax.device_count() / median
    return {
        "parameters": parameter_counts(config).total,
        "tokens_per_step": tokens,
        "compile_seconds": compile_seconds,
        "step_seconds": median,
        "tokens_per_second": tokens / median,
        "mfu": flops / peak,
        "memory_bytes": step.memory | device_memory(),
        "loss": float(metrics["loss"]),
        "finite": all(finite),
    }


def planned(config: Config, chip):
    """Plans a step on these devices, whose peaks are the `hardware.Chip`: `{"seconds", "kind"}`.
    On TPU and GPU the step is compiled again for its likely time; on CPU the bound stands.
    """
    devices = jax.devices()
    kind, compiles = devices[0].device_kind, devices[0].platform in ("tpu", "gpu")
    found = plan(config, GENERATIONS.get(kind, kind), devices, compiles, chip)
    if likely := found["likely_step_seconds"]:
        return {"seconds": likely, "kind": "likely"}
    return {"seconds": found["step_seconds"], "kind": f"at least, by {found['bound_by']}"}

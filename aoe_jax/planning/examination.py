"""Examines a machine: chooses backends, checks kernels and times training steps.

The command is `python -m aoe_jax.doctor`.
"""

import dataclasses
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.attention import backend_for as attention_backend
from aoe_jax.model.attention.cudnn import check as check_cudnn
from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.moe.grouped_matmul import backend_for as grouped_backend
from aoe_jax.moe.grouped_matmul.mosaic_gpu import check as check_mosaic_gpu
from aoe_jax.planning import kernel_checks
from aoe_jax.planning.hardware import machine
from aoe_jax.sharding import fill_mesh, make_mesh
from aoe_jax.training.devices import peak_flops_per_device
from aoe_jax.training.step_times import RepeatedStep

STEPS = 10
MAX_TOKENS = 16_384  # per device and step


def examine(config: Config, show):
    """Examines all devices of all processes with the configuration that `fitted` returns.

    `show` is called with each line of text as soon as its result is known. Returns the dict that
    `--json` writes. Raises `UserError` for a setting that these devices do not allow.
    """
    config = fitted(config, jax.device_count())
    mesh = make_mesh(config, jax.devices())
    report = {"machine": machine(), "configuration": config.to_dict(), "verdicts": []}
    show(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    sequences = f"{kernel_checks.sequences_per_device(config)} x {config.data.seq_len}"
    show(f"mesh {axes}; {sequences} tokens a device, {config.model.dtype}")
    with jax.set_mesh(mesh):
        report["backends"] = choose_backends(config, mesh.devices.flat[0])
        for backend in report["backends"]:
            show(f"{backend['kernel']}: {backend['backend']} ({backend['why']})")
        for verdict in kernel_verdicts(config, mesh, report["backends"]):
            _add(report, verdict, show)
    report["steps"] = _attempt(take_steps, config)
    _add(report, steps_verdict(report["steps"]), show)
    report["passed"] = all(verdict["passed"] for verdict in report["verdicts"])
    return report


def _add(report, verdict, show):
    report["verdicts"].append(verdict)
    show(f"{'PASS' if verdict['passed'] else 'FAIL'} {verdict['name']}: {verdict['text']}")


def fitted(config: Config, n_devices):
    """Returns `config` with short steps: at most `MAX_TOKENS` per device or one longer sequence."""
    config = fill_mesh(config, n_devices)
    shards, train = config.mesh.batch_shards, config.train
    sequences = train.batch_size // train.accumulate // shards
    sequences = min(sequences, max(1, MAX_TOKENS // config.data.seq_len))
    train = dataclasses.replace(train, batch_size=sequences * shards, accumulate=1)
    return dataclasses.replace(config, train=train)


def _attempt(function, *args):
    """Returns `function(*args)`, or `{"error": text}` after an exception other than `UserError`."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as e:  # compilers and runtimes raise their own types
        last = (str(e).strip().splitlines() or [""])[-1][:300]
        return {"error": f"{type(e).__name__}: {last}"}


def choose_backends(config, device):
    """Returns `[{"kernel", "backend", "why"}]`, attention first; products also have "shape"."""
    m, dtype, chosen = config.model, jnp.dtype(config.model.dtype), config.experts.grouped_matmul
    name = attention_backend(device, dtype, m.head_width)
    why = _why(device, name == "blocks", partial(check_cudnn, dtype, m.head_width))
    if m.attention != "auto":
        name, why = m.attention, f"set by config.model.attention={m.attention}"
    found = [{"kernel": "attention", "backend": name, "why": why}]
    weights = {}
    for weight, shape in kernel_checks.expert_shapes(config).items():
        weights.setdefault(shape, []).append(weight)
    for shape, names in weights.items():
        name = grouped_backend(device, dtype, kernel_checks.rows_per_device(config), shape[0])
        why = _why(device, name == "blocked", partial(check_mosaic_gpu, dtype))
        if chosen != "auto":
            name, why = chosen, f"set by config.experts.grouped_matmul={chosen}"
        kernel = f"grouped products of {', '.join(names)} {'x'.join(map(str, shape))}"
        found.append({"kernel": kernel, "backend": name, "why": why, "shape": shape})
    return found


def _why(device, is_plain, check):
    """Returns why "auto" selects a backend; `check` raises `UserError` if the GPU has no kernel."""
    if is_plain and device.platform == "gpu":
        try:
            check()
        except UserError as refusal:
            return str(refusal)
    return f"{'plain JAX' if is_plain else 'the fastest'} on {device.device_kind}"


def kernel_verdicts(config, mesh, backends):
    """Checks attention, grouped products and the MoE layer; `mesh` must be the current mesh.

    Yields a dict for each case: `name`, `passed`, `text`, `checks`, and `fallback` if the case
    failed. `checks` is the result of `kernel_checks.check`, or `{"error"}` after an exception.
    """
    attention, *grouped = backends
    cases = kernel_checks.attention_cases(config, attention["backend"])
    cases += [kernel_checks.grouped_case(config, b["backend"], b["shape"]) for b in grouped]
    cases.append(kernel_checks.layer_case(config))
    for case in filter(None, cases):
        checks = _attempt(kernel_checks.check, case, mesh, config.model.dtype)
        if "error" in checks:
            passed, text = False, checks["error"]
        else:
            worst = max(checks, key=lambda check: max(check["errors"].values()))
            name, error = max(worst["errors"].items(), key=lambda item: item[1])
            text = f"{worst['input']}: largest error {error:.1e} ({name}, {worst['device']})"
            text += f", tolerance {worst['tolerance']:.1e}"
            passed = all(check["passed"] for check in checks)
        found = {"name": case.kernel, "passed": passed, "text": f"{case.shape}: {text}"}
        if not passed:
            found["fallback"] = fallback(case.kernel, config)
            found["text"] += f"; fallback: {found['fallback']}"
        yield found | {"checks": checks}


def take_steps(config: Config):
    """Runs `STEPS` training steps on random tokens. Returns the last loss and the speed of the
    median step. `mfu` is None without known peak FLOPs; `finite` is true if all steps were finite.
    """
    step, seconds, finite = RepeatedStep(config), [], []
    jax.block_until_ready(step())
    for _ in range(STEPS):
        started = time.perf_counter()
        metrics = jax.block_until_ready(step())
        seconds.append(time.perf_counter() - started)
        finite.append(bool(metrics["finite"]))
    median, tokens = statistics.median(seconds), config.tokens_per_step
    peak = peak_flops_per_device(jax.devices())
    flops = tokens * training_flops_per_token(config) / jax.device_count() / median
    return {
        "step_seconds": median,
        "tokens_per_second": tokens / median,
        "mfu": flops / peak if peak else None,
        "loss": float(metrics["loss"]),
        "finite": all(finite),
    }


def steps_verdict(steps):
    """Returns the verdict on `steps`, the result of `take_steps` or `{"error": text}`."""
    if "error" in steps:
        text = steps["error"]
    else:
        finite = "" if steps["finite"] else ", not finite in some steps"
        mfu = f", MFU {steps['mfu']:.3f}" if steps["mfu"] else ""
        speed = f"{steps['tokens_per_second']:,.0f} tokens/s{mfu}"
        milliseconds = 1e3 * steps["step_seconds"]
        text = f"loss {steps['loss']:.3f}{finite}; {milliseconds:.4g} ms a step, {speed}"
    return {"name": "training steps", "passed": steps.get("finite", False), "text": text}


def fallback(kernel, config: Config):
    """Returns the flag that avoids a kernel, or a text that begins with "none" if no flag does."""
    kind, _, backend = kernel.rpartition(" ")
    if backend in ("blocks", "blocked", "rowwise"):
        return "none, it is plain JAX"
    if kind == "attention":
        return "--config.model.attention=blocks"
    if kind == "grouped products":
        return "--config.experts.grouped_matmul=blocked"
    if config.mesh.transport == "all_to_all":
        return "--config.mesh.transport=ring"
    if config.mesh.expert > 1:
        return "--config.mesh.expert=1"
    return "--config.experts.grouped_matmul=blocked"  # SwiGLU on TPU has kernels of its own

"""The whole examination: backends, checks of kernels, measurements, training steps, verdicts."""

import math
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.model.attention import backend_for as attention_backend
from aoe_jax.model.attention.cudnn import check as check_cudnn
from aoe_jax.moe.grouped_matmul import backend_for as grouped_backend
from aoe_jax.moe.grouped_matmul.mosaic_gpu import check as check_mosaic_gpu
from aoe_jax.planning import hardware
from aoe_jax.planning.doctor import kernels, speed
from aoe_jax.planning.doctor.steps import fitted, planned, run_steps, twins
from aoe_jax.sharding import count_slices, make_mesh
from aoe_jax.training.devices import peak_flops_per_device

MODELS = {"aoe": "AoE", "router": "MoE"}


def examine(config: Config, show):
    """Examines all devices of all processes, part after part.

    The configuration is made to fit (`steps.fitted`). `show` is called with each line of text as
    soon as a part is done. Returns the content of `--json`; a part that raised an exception has
    `error` instead of numbers. Raises `UserError` for a setting that these devices do not allow.
    """
    started = time.perf_counter()

    def say(line):
        show(f"[{time.perf_counter() - started:5.1f} s] {line}")

    config = fitted(config, jax.device_count())
    mesh, models = make_mesh(config, jax.devices()), twins(config)
    report = {"machine": hardware.machine(), "configuration": config.to_dict()}
    say(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    sequences = f"{kernels.sequences_per_device(config)} x {config.data.seq_len}"
    say(f"mesh {axes}; {sequences} tokens a device, {config.model.dtype}")
    with jax.set_mesh(mesh):
        report["backends"] = choose_backends(config, models, mesh.devices.flat[0])
        for backend in report["backends"]:
            say(f"{backend['kernel']}: {backend['backend']} ({backend['why']})")
        report["checks"] = check_kernels(config, models, mesh, report["backends"], say)
    report["measurements"] = found = measure(config, mesh, report["backends"], say)
    report["steps"] = {name: take_steps(name, c, found, say) for name, c in models.items()}
    report["verdicts"] = verdicts(report)
    report["passed"] = all(verdict["passed"] for verdict in report["verdicts"])
    report["seconds"] = time.perf_counter() - started
    say("done; verdicts:")
    for verdict in report["verdicts"]:
        result = "PASS" if verdict["passed"] else "FAIL"
        fallback = f"; fallback: {verdict['fallback']}" if verdict["fallback"] else ""
        show(f"{result} {verdict['name']}: {verdict['text']}{fallback}")
    return report


def _attempt(function, *args):
    """The result, or `{"error": last line of what it raised}`; a user's mistake is raised."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as e:  # compilers and runtimes have their own kinds
        last = (str(e).strip().splitlines() or [""])[-1][:300]
        return {"error": f"{type(e).__name__}: {last}"}


def choose_backends(config, models, device):
    """The backends of attention and of each grouped product, and why they are chosen."""
    m, dtype, chosen = config.model, jnp.dtype(config.model.dtype), config.experts.grouped_matmul
    name = attention_backend(device, dtype, m.head_width)
    why = _why(device, name == "blocks", partial(check_cudnn, dtype, m.head_width))
    if m.attention != "auto":
        name, why = m.attention, f"set by config.model.attention={m.attention}"
    found = [{"kernel": "attention", "backend": name, "why": why}]
    weights = {}
    for c in models.values():
        for weight, shape in kernels.expert_shapes(c).items():
            weights.setdefault(shape, set()).add(weight)
    for shape, names in weights.items():
        name = grouped_backend(device, dtype, kernels.rows_per_device(config), shape)
        why = _why(device, name == "blocked", partial(check_mosaic_gpu, dtype, *shape[1:]))
        if chosen != "auto":
            name, why = chosen, f"set by config.experts.grouped_matmul={chosen}"
        kernel = f"grouped products of {', '.join(sorted(names))} {'x'.join(map(str, shape))}"
        found.append({"kernel": kernel, "backend": name, "why": why, "shape": shape})
    return found


def _why(device, is_plain, check):
    """Why a backend is chosen: `check` says what the kernels for GPUs refuse."""
    if is_plain and device.platform == "gpu":
        try:
            check()
        except UserError as refusal:
            return str(refusal)
    return f"{'plain JAX' if is_plain else 'the fastest'} on {device.device_kind}"


def check_kernels(config, models, mesh, backends, say):
    """Checks attention, the grouped products and the layers of all models on the mesh in context;
    returns results of `kernels.check`, with `error` instead of `errors` for a case that raised.
    """
    attention, *grouped = backends
    cases = kernels.attention_cases(config, attention["backend"])
    cases += [kernels.grouped_case(config, b["backend"], b["shape"]) for b in grouped]
    cases += [kernels.layer_case(c, MODELS.get(c.experts.kind)) for c in models.values()]
    found = []
    for case in filter(None, cases):
        results = _attempt(kernels.check, case, mesh, config.model.dtype)
        if "error" in results:
            results = [{"kernel": case.kernel, "shape": case.shape, "passed": False, **results}]
        for result in results:
            found.append(result)
            say(f"{case.kernel}, {case.shape}: {_in_words(result)}")
    return found


def _in_words(result):
    if "error" in result:
        return result["error"]
    name = max(result["errors"], key=result["errors"].get)
    place = name if result["passed"] else f"{name}, {result['device']}"
    return (
        f"{result['input']}: largest error {result['errors'][name]:.1e} ({place}), "
        f"tolerance {result['tolerance']:.1e}"
    )


def measure(config, mesh, backends, say):
    """Measures the works of `speed`, by name: `seconds`, `per_second` (FLOPs or bytes, as `unit`
    says) and the `share` of the measured matmul or of the published peak, as `of` says, or None.
    """
    attention, *grouped = backends
    row, found = Mesh(mesh.devices.ravel(), ("all",), axis_types=mesh.axis_types[:1]), {}
    works = speed.peaks(config, row) + speed.attention(config, attention["backend"])
    own = kernels.expert_shapes(config).values()
    for b in (b for b in grouped if b["shape"] in own):
        works += speed.grouped_products(config, b["backend"], b["shape"])
    if row.size > 1:
        works += speed.collectives(row)
    with jax.set_mesh(row):
        for work in works:
            found[work.name] = _attempt(_measured, work, row, found)
            say(f"{work.name}: {_rate_in_words(found[work.name])}")
    if row.size == 1:
        say("collectives: left out, there is one device")
    return found


def _measured(work, mesh, found):
    """The figures of `measure` for a piece of work; `found` has those of the pieces before it."""
    seconds, devices = speed.seconds_of(work, mesh), list(mesh.devices.flat)
    rate, peak, of = work.amount / seconds, None, "published"
    if work.peak == "matmul":
        peak, of = found["matmul"].get("per_second"), "matmul"
    elif published := hardware.published_peaks(devices):
        if work.peak != "link_bandwidth":
            peak = getattr(published, work.peak)
        elif count_slices(devices) == 1:
            peak = published.group_bandwidth(hardware.slice_shape(devices), len(devices))
    share = rate / peak if peak else None
    return {"seconds": seconds, "per_second": rate, "unit": work.unit, "share": share, "of": of}


def _rate_in_words(figures):
    if "error" in figures:
        return figures["error"]
    scale, unit = (1e12, "TFLOP/s") if figures["unit"] == "FLOP" else (1e9, "GB/s")
    share = ""
    if figures["share"]:
        of = "the published peak" if figures["of"] == "published" else "the measured matmul"
        share = f", {figures['share']:.2f} of {of}"
    return f"{1e3 * figures['seconds']:.3g} ms, {figures['per_second'] / scale:.3g} {unit}{share}"


def take_steps(name, config, measurements, say):
    """The result of `steps.run_steps`; `peak`, whether MFU is by the published or the measured
    peak; and the `plan`, see `steps.planned`, by measured peaks where none are published.
    """
    published = hardware.published_peaks(jax.devices())
    peak = peak_flops_per_device(jax.devices())
    by = "published" if peak else "measured"
    rate = {work: figures.get("per_second", math.nan) for work, figures in measurements.items()}
    peak, link = peak or rate["matmul"], rate.get("all_gather", math.inf)
    chip = published or hardware.Chip(peak, math.inf, rate["HBM"], link, link)
    figures = _attempt(run_steps, config, peak) | {"peak": by}
    if "error" in figures:
        say(f"steps of {name}: {figures['error']}")
        return figures
    memory = ", ".join(
        f"{part.removesuffix('_bytes').replace('_', ' ')} {size / 1e9:.3g} GB"
        for part, size in figures["memory_bytes"].items()
    )
    say(
        f"steps of {name}: {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{1e3 * figures['step_seconds']:.4g} ms a step, MFU {figures['mfu']:.3f} of the "
        f"{figures['peak']} peak, compiled in {figures['compile_seconds']:.0f} s; "
        f"memory of a device: {memory}"
    )
    found = figures["plan"] = _attempt(planned, config, chip)
    text = found.get("error")
    if not text:
        ratio = found["measured_over_planned"] = figures["step_seconds"] / found["seconds"]
        text = f"{1e3 * found['seconds']:.4g} ms ({found['kind']}); measured is {ratio:.2f}x"
    say(f"plan of {name}: {text}")
    return figures


def verdicts(report):
    """One verdict for each kernel, for each measurement that raised, and for the steps."""
    found, config = [], report["configuration"]

    def judge(name, passed, text, fallback=None):
        found.append({"name": name, "passed": passed, "text": text, "fallback": fallback})

    for kernel in dict.fromkeys(check["kernel"] for check in report["checks"]):
        of_kernel = [check for check in report["checks"] if check["kernel"] == kernel]
        failed, n = [check for check in of_kernel if not check["passed"]], len(of_kernel)
        if failed:
            text = f"{len(failed)} of {n} checks failed; {failed[0]['shape']}"
            judge(kernel, False, f"{text}: {_in_words(failed[0])}", fallback(kernel, config))
        else:
            worst = max(of_kernel, key=lambda c: max(c["errors"].values()) / c["tolerance"])
            judge(kernel, True, f"{n} checks; {_in_words(worst)}")
    for name, figures in report["measurements"].items():
        if "error" in figures:
            judge(name, False, figures["error"])
    for name, figures in report["steps"].items():
        finite = figures.get("finite", False)
        text = figures.get("error") or f"loss {figures['loss']:.3f}"
        text += "" if finite or "error" in figures else ", not finite in every step"
        judge(f"steps of {name}", finite, text)
    return found


def fallback(kernel, config):
    """The setting that avoids a kernel, in words."""
    kind, _, backend = kernel.rpartition(" ")
    if backend in ("blocks", "blocked", "rowwise"):
        return "none, it is plain JAX"
    if kind == "attention":
        return "--config.model.attention=blocks"
    if kind == "grouped products":
        return "--config.experts.grouped_matmul=blocked"
    if config["mesh"]["transport"] == "all_to_all":
        return "--config.mesh.transport=ring"
    return "--config.mesh.expert=1" if config["mesh"]["expert"] > 1 else "none"

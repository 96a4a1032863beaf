"""What a run says while it runs: speed, utilisation, memory, where time goes, and how the experts
fare.

Figures are measured here and go, as one readable line and to the writers of `writers.py`, every
`train.log_every` steps. L layers, n experts.
"""

import contextlib
import logging
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config import Config
from aoe_jax.counts import training_flops_per_token
from aoe_jax.experts.balance import dead_experts, load_entropy, load_spread, mean_load
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.hardware import peak_flops_per_device
from aoe_jax.training.memory import device_memory, host_memory, program_memory
from aoe_jax.training.writers import JsonLines, TensorBoard, Wandb

log = logging.getLogger(__name__)

# What is measured and not computed: the keys of a line in which two runs of the same steps differ.
MEASURED_KEYS = {
    "tokens_per_second",
    "tokens_per_second_per_device",
    "flops_per_second_per_device",  # useful ones, see `counts.training_flops_per_token`
    "mfu",
    "input_seconds",
    "checkpoint_seconds",
    "compute_seconds",
    "validation_seconds",
    "host_memory_bytes",
    "host_memory_peak_bytes",
    "device_memory_bytes",
    "device_memory_peak_bytes",
}
_IN_SPEED = (
    "input",
    "checkpoint",
)  # what the clocks of a training step may show; other clocks count in no speed
_SCALARS = ("loss", "nll", "aux_loss", "grad_norm", "update_norm", "param_norm", "learning_rate")
_NAMED_ELSEWHERE = {*_SCALARS, "skipped", "finite"}


def expert_scalars(metrics):
    """Of host metrics of a step, one number each: means over layers, but `load_spread`, a sum. A
    dense model has none.
    """
    load = metrics["load"]
    if load.shape[-1] == 1:
        return {}
    dropped = (
        {"dropped_share": float(np.mean(metrics["dropped_share"]))}
        if "dropped_share" in metrics
        else {}
    )
    return dropped | {
        "load_entropy": float(np.mean(load_entropy(load))),
        "load_spread": float(load_spread(load, metrics.get("live"))),
        "confidence_entropy": float(np.mean(metrics["confidence_entropy"])),
        "experts_per_token": float(np.mean(load.sum(axis=-1))),
    }


def method_losses(metrics):
    """Of host metrics of a step, the losses that some methods and settings have beside those of
    all.
    """
    return {
        name: float(a)
        for name, a in metrics.items()
        if np.ndim(a) == 0 and name not in _NAMED_ELSEWHERE
    }


def layer_figures(metrics, kind):
    """Of host metrics of a step, one number a layer: name -> `[L]`. A dense model has none.

    `load_entropy` and `confidence_entropy` in nats, `load_max_over_mean` (1 in perfect balance),
    `dead_experts` (those with no token in the batch), and the mean over experts of their mean norms
    (AoE) or logits (router), or of the relative scores that stand for them. Where experts have a
    capacity, `dropped_share` too: the share of the choices that found no room. Where experts are
    added and removed, `live_experts` too; free places count in no figure of the load.
    """
    load, live = metrics["load"], metrics.get("live")
    if load.shape[-1] == 1:
        return {}
    of_some = {"dropped_share": metrics["dropped_share"]} if "dropped_share" in metrics else {}
    if live is not None:
        of_some["live_experts"] = (live > 0).sum(axis=-1)
    return of_some | {
        "load_entropy": load_entropy(load),
        "load_max_over_mean": load.max(axis=-1) / np.maximum(mean_load(load, live), 1e-9),
        "dead_experts": dead_experts(load, live).sum(axis=-1),
        "confidence_entropy": metrics["confidence_entropy"],
        LAYERS[kind].score_name: metrics["mean_score"].mean(axis=-1),
    }


def _by_expert(metrics, kind):
    """Of host metrics of a step, one number an expert and layer: name -> `[L, n]`. A dense model
    has none.
    """
    if metrics["load"].shape[-1] == 1:
        return {}
    return {"load": metrics["load"], LAYERS[kind].score_name: metrics["mean_score"]}


class Speed:
    """Speed and utilisation of a configuration on the devices of this run.

    MFU is the useful FLOPs of training over the peak of the chip in bfloat16, whatever the dtype of
      computation: a float32
    run is held against the same peak. Where the chip isn't known there is no MFU, and that is said
    once.
    """

    def __init__(self, config: Config):
        """Looks up the peak of the devices."""
        devices = jax.devices()
        self.tokens_per_step = config.tokens_per_step
        self._flops_per_token, self._n_devices = training_flops_per_token(config), len(devices)
        self._peak = peak_flops_per_device(devices)
        if self._peak is None:
            log.info(
                "no MFU: the peak of %r isn't known, see hardware.PEAK_FLOPS",
                devices[0].device_kind,
            )

    def figures(self, n_steps, seconds):
        """Of `n_steps` that took `seconds`."""
        tokens = n_steps * self.tokens_per_step / seconds
        flops = self._flops_per_token * tokens / self._n_devices
        figures = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / self._n_devices,
            "flops_per_second_per_device": flops,
        }
        return figures | ({"mfu": flops / self._peak} if self._peak else {})


class Telemetry:
    """Measures a run and writes its figures: one in the first process.

    `start` begins the time that counts; from then on it is split into `input`, in which the loop
    waits for the next batch, `checkpoint`, in which saving holds it up, and `compute`, all the
    rest. Devices compute while the loop waits, so what waiting costs is at most its seconds.
    Evaluation is reported by itself and counts in no speed.
    """

    def __init__(
        self, workdir: Path, config: Config, start_step, validated=True, wandb_project=None
    ):
        """Opens the files for a run that goes on from `start_step`; `validated`: whether its
        validation is done.

        Raises:
          UserError: Weights & Biases, where a project is named, can't be reached; see
            `writers.Wandb`.
        """
        self._tensorboard = TensorBoard(workdir / "tensorboard", start_step)
        self._writers = [
            JsonLines(workdir / "metrics.jsonl", start_step, validated),
            self._tensorboard,
        ]
        if wandb_project is not None:
            self._writers.append(Wandb(workdir, wandb_project, config.to_dict()))
        self._total_steps, self._kind = config.train.steps, config.experts.kind
        self._speed = Speed(config)
        self._program = {}
        self._start_step = self._last_step = start_step
        self._last_time = time.perf_counter()
        self._interval, self._total = (
            Counter(),
            Counter(),
        )  # seconds by clock, since the last line and of the run

    @contextlib.contextmanager
    def clock(self, name):
        """Counts the time within as that of `input`, `checkpoint`, `evaluation` or `compile`;
        traces show its name.
        """
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._interval[name] += time.perf_counter() - started

    def start(self, state, step):
        """Begins the time that counts; takes the train state and the compiled step, see
        `memory.program_memory`.
        """
        self._program = program_memory(state, step)
        log.info(
            "compiled the train step in %.1f s; memory of a device: state %s, a step %s more",
            self._interval["compile"],
            *(_bytes(self._program[name]) for name in ("state_bytes", "temporary_bytes")),
        )
        self._total["compile"] += self._interval["compile"]
        self._interval, self._last_time = Counter(), time.perf_counter()

    def train(self, step, metrics):
        """Reports host metrics of training step `step`; call it every `log_every` steps."""
        n_steps, split = self._end_interval(step)
        speed = self._speed.figures(n_steps, sum(split.values()))
        scalars = {name: float(metrics[name]) for name in _SCALARS} | {
            "skipped": int(metrics["skipped"])
        }
        scalars |= expert_scalars(metrics) | method_losses(metrics)
        measured = (
            speed
            | {f"{name}_seconds": s for name, s in split.items()}
            | host_memory()
            | device_memory()
        )
        by_layer, by_expert = layer_figures(metrics, self._kind), _by_expert(metrics, self._kind)
        self._write(step, "train", scalars | measured, by_layer, by_expert)
        balance = ""
        if "load_entropy" in scalars:
            n_live = (
                (metrics["live"] > 0).sum(axis=-1)
                if "live" in metrics
                else metrics["load"].shape[-1]
            )
            balance = (
                f" | load entropy {scalars['load_entropy']:.3f} of {np.mean(np.log(n_live)):.3f}"
            )
        log.info(
            "step %d/%d | loss %.4f | nll %.4f%s | %s | %s | %s left",
            step,
            self._total_steps,
            scalars["loss"],
            scalars["nll"],
            balance,
            _speed_in_words(speed),
            _split_in_words(split),
            _duration(sum(split.values()) / n_steps * (self._total_steps - step)),
        )

    def _end_interval(self, step):
        """`(steps, seconds by part)` since the last line; evaluation and its like are left out."""
        now = time.perf_counter()
        split = {name: self._interval[name] for name in _IN_SPEED}
        others = self._interval.total()
        split["compute"] = max(now - self._last_time - others, 1e-9)
        n_steps = max(step - self._last_step, 1)
        self._total += self._interval + Counter({"compute": split["compute"]})
        self._interval, self._last_step, self._last_time = Counter(), step, now
        return n_steps, split

    def evaluation(self, step, result):
        """Reports an `Evaluation` of the validation split; in TensorBoard also the load that it
        found, drawn.
        """
        seconds = self._end_evaluation()
        scalars = {f"validation_{name}": value for name, value in result.figures().items()}
        self._write(step, "validation", scalars | {"validation_seconds": seconds}, {}, {})
        log.info(
            "step %d/%d | validation %s | in %s",
            step,
            self._total_steps,
            result,
            _duration(seconds),
        )
        if self._kind != "dense":
            with self.clock("evaluation"):
                from aoe_jax.evaluation.load import (
                    draw_load_heatmap,
                    load_statistics,
                )  # matplotlib takes half a second

                statistics = load_statistics(result.stats, self._kind)
                figure = draw_load_heatmap(statistics, f"{self._kind}, validation, step {step}")
                self._tensorboard.draw(step, "experts/load", figure)
            self._end_evaluation()

    def _end_evaluation(self):
        """The seconds of evaluation since the last one; the steps before and after it are one
        interval.
        """
        seconds = self._interval.pop("evaluation", 0.0)
        self._total["evaluation"] += seconds
        self._last_time += seconds
        return seconds

    def _write(self, *figures):
        for writer in self._writers:
            writer.write(*figures)

    def sync(self):
        """Waits until what is written is on the disk: before a checkpoint, which would else say
        more than was written.
        """
        for writer in self._writers:
            writer.sync()

    def timing(self):
        """Speed of the whole run, and its seconds by part: the group `timing` of `summary.json`."""
        total = self._total + self._interval
        n_steps, seconds = (
            self._last_step - self._start_step,
            sum(total[name] for name in (*_IN_SPEED, "compute")),
        )
        names = ("input", "checkpoint", "compute", "evaluation", "compile")
        return self._speed.figures(n_steps, max(seconds, 1e-9)) | {
            f"{name}_seconds": total[name] for name in names
        }

    def memory(self):
        """The group `memory` of `summary.json`: what a device needs, and what this process and its
        devices hold.
        """
        return self._program | host_memory() | device_memory()

    def close(self):
        """Flushes and closes the files."""
        for writer in self._writers:
            writer.close()


class NoTelemetry:
    """In processes other than the first: does nothing of it all."""

    def __init__(self, *_):
        """As `Telemetry`."""

    def clock(self, name):
        """Counts nothing."""
        return contextlib.nullcontext()

    def start(self, state, step):
        """Begins nothing."""

    def train(self, step, metrics):
        """Reports nothing."""

    def evaluation(self, step, result):
        """Reports nothing."""

    def sync(self):
        """Waits for nothing."""

    def timing(self):
        """Nothing was measured."""
        return {}

    def memory(self):
        """Nothing was measured."""
        return {}

    def close(self):
        """Closes nothing."""


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bytes(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _speed_in_words(speed):
    words = (
        f"{speed['tokens_per_second']:,.0f} tokens/s, a device {speed['tokens_per_second_per_device']:,.0f} and "
        f"{speed['flops_per_second_per_device'] / 1e12:.3g} TFLOP/s"
    )
    return words + (f", MFU {100 * speed['mfu']:.1f}%" if "mfu" in speed else "")


def _split_in_words(split):
    total = sum(split.values())
    return ", ".join(f"{name} {100 * split[name] / total:.1f}%" for name in _IN_SPEED)

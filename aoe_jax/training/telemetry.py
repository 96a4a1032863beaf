"""What a run says while it runs: one readable line, `metrics.jsonl` and TensorBoard files."""

import json
import logging
import os
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

log = logging.getLogger(__name__)


def _scalars(metrics):
    """Host metrics of a step as plain numbers; per-layer and per-expert arrays stay with TensorBoard."""
    load = metrics["load"]
    scalars = {k: float(metrics[k]) for k in ("loss", "nll", "aux_loss", "grad_norm", "learning_rate")}
    if load.shape[-1] > 1:
        scalars |= {
            "load_entropy": float(np.mean(metrics["load_entropy"])),
            "load_spread": float(metrics["load_spread"]),
            "confidence_entropy": float(np.mean(metrics["confidence_entropy"])),
            "experts_per_token": float(np.mean(load.sum(axis=-1))),
        }
    return scalars


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Telemetry:
    """Writes a run's metrics; lines of steps after `start_step`, left by a run that was cut off, are dropped."""

    def __init__(self, workdir: Path, start_step, total_steps, tokens_per_step):
        """Opens the files for a run that goes on from `start_step`."""
        self._path = workdir / "metrics.jsonl"
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start_step]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, self._path)
        self._file = self._path.open("a")
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._last_step, self._last_time = start_step, time.perf_counter()

    def train(self, step, metrics):
        """Reports host metrics of training step `step`; call it every `log_every` steps."""
        now = time.perf_counter()
        seconds_per_step = (now - self._last_time) / max(step - self._last_step, 1)
        self._last_step, self._last_time = step, now
        scalars = _scalars(metrics)
        tokens_per_second = self._tokens_per_step / seconds_per_step
        self._write(step, {**scalars, "tokens_per_second": tokens_per_second}, "train")
        for layer, norms in enumerate(metrics["mean_score"]):
            self._writer.add_histogram(f"experts/mean_score/layer_{layer}", norms, step)
        balance = ""
        if "load_entropy" in scalars:
            n_experts = metrics["load"].shape[-1]
            balance = f" | load entropy {scalars['load_entropy']:.3f} of {np.log(n_experts):.3f}"
        log.info(
            "step %d/%d | loss %.4f | nll %.4f%s | %s tokens/s | %s left",
            step,
            self._total_steps,
            scalars["loss"],
            scalars["nll"],
            balance,
            f"{tokens_per_second:,.0f}",
            _clock(seconds_per_step * (self._total_steps - step)),
        )

    def evaluation(self, step, result):
        """Reports an `Evaluation` of the validation split; the time it took counts in no training speed."""
        self._write(step, {f"validation_{name}": value for name, value in result.figures().items()}, "validation")
        log.info("step %d/%d | validation %s", step, self._total_steps, result)
        self._last_time = time.perf_counter()

    def _write(self, step, scalars, group):
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._writer.add_scalar(f"{group}/{name.removeprefix(group + '_')}", value, step)

    def close(self):
        """Flushes and closes the files."""
        self._file.close()
        self._writer.close()


class NoTelemetry:
    """In processes other than the first."""

    def __init__(self, *_):
        """As `Telemetry`."""

    def train(self, step, metrics):
        """Reports nothing."""

    def evaluation(self, step, result):
        """Reports nothing."""

    def close(self):
        """Closes nothing."""


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the half line of a killed run
        return float("inf")

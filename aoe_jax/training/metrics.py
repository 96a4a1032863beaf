"""The metrics of a run: loss, load of experts, speed, memory, and time by activity.

Every `train.log_every` steps, `Metrics` writes one line to the log and passes all metrics to the
writers of `writers.py`. Below, L is the number of layers.
"""

import contextlib
import json
import logging
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config.run import Config
from aoe_jax.errors import DivergedError
from aoe_jax.model.counts import parameter_counts, training_flops_per_token
from aoe_jax.moe.load_balance import layer_statistics, load_spread
from aoe_jax.storage.files import write_whole
from aoe_jax.storage.retry import Tolerated
from aoe_jax.training import devices
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.validation import perplexity

log = logging.getLogger(__name__)

# Metrics whose names end in these words are measured, so they differ between equal runs.
MEASURED = ("seconds", "bytes", "per_second", "per_device", "mfu", "goodput")
_IN_SPEED = ("input", "checkpoint")  # tokens/s = tokens / time of these and `compute`


def layer_metrics(metrics):
    """Returns `{name: values [L]}` from the metrics of a step on the host; {} for a dense model.

    The values are the `layer_statistics`, `confidence_entropy` in nats, `mean_score` (of AoE's
    norms or router logits) and `dropped_share`, the fraction of choices dropped by full experts.
    """
    load = metrics["load"]
    if load.shape[-1] == 1:
        return {}
    found = layer_statistics(load, metrics.get("live"))
    names = ("confidence_entropy", "dropped_share")
    found |= {name: metrics[name] for name in names if name in metrics}
    return found | {"mean_score": metrics["mean_score"].mean(axis=-1)}


class Metrics:
    """Measures a run and, in the first process, writes its metrics.

    The training time after `begin` is split into `input` (the loop waits for the next batch),
    `checkpoint` (the loop waits for a save) and `compute` (the rest). The time of evaluations,
    samples and compilation is excluded. MFU is relative to the chip's bfloat16 peak, even if the
    run computes in float32.
    """

    def __init__(self, folder: Path, config: Config, start_step, progress: Progress, began):
        """`start_step` is the number of updates done, `began` the time of the run's first start."""
        self._config, self._folder, self._start_step = config, folder, start_step
        self._progress, self._began = progress, began
        self._writers, self._lines = {}, None
        self._unreported = None  # `(step, metrics on devices)` until `flush` reports them
        self._program = {}
        self._seconds = Counter()  # clock -> seconds; `compute` counts up to the newest log line
        self._line_step, self._line_time = start_step, time.perf_counter()
        self._line_seconds, self._evaluated = Counter(), 0.0
        self._flops_per_token = training_flops_per_token(config)
        self._peak = devices.peak_flops_per_device(jax.devices())

    def open(self, check, wandb=None):
        """Opens the files of the run; only process 0 calls it. Before each line is written,
        `check()` raises if another process owns the files. `wandb` is a project name or None.
        """
        from aoe_jax.training.writers import JsonLines, TensorBoard

        self._check = check
        self._lines = JsonLines(self._folder / "metrics.jsonl", self._progress.metrics_bytes)
        writers = [self._lines]
        with Tolerated(TensorBoard.name):
            writers.append(TensorBoard(self._folder / "tensorboard", self._start_step))
        if wandb is not None:
            from aoe_jax.training.wandb_writer import Wandb  # an optional dependency

            try:
                writers.append(Wandb(self._folder, wandb, self._config.to_dict()))
            except ConnectionError as e:
                log.warning(f"Weights & Biases cannot be reached ({e}); the run goes on without it")
        self._writers = {writer: Tolerated(writer.name) for writer in writers}

    @contextlib.contextmanager
    def clock(self, name):
        """A context that times `input`, `checkpoint`, `evaluation`, `sample` or `compile`."""
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def begin(self, state, step):
        """Starts the clocks of the run. `state` is its first state, `step` its compiled step."""
        self._program = devices.program_memory(state, step)
        log.info(
            f"compiled the train step in {self._seconds['compile']:.1f} s; on each device the "
            f"state takes {self._program['state_bytes'] / 1e9:.3g} GB, and a step "
            f"{self._program['temporary_bytes'] / 1e9:.3g} GB more"
        )
        self._line_time, self._line_seconds = time.perf_counter(), self._seconds.copy()

    def step(self, step, metrics):
        """Stores the metrics of the newest step, still on devices; reports the previous step."""
        self.flush()
        self._unreported = step, metrics

    def flush(self):
        """Waits for a step that is not yet reported, and reports it. Raises `DivergedError`."""
        if self._unreported is None:
            return
        (step, metrics), self._unreported = self._unreported, None
        names = ("loss", "nll", "grad_norm", "finite", "updated")
        small = jax.device_get({name: metrics[name] for name in names})
        progress, train = self._progress, self._config.train
        progress.loss, progress.nll = float(small["loss"]), float(small["nll"])
        progress.skipped_in_row = 0 if small["finite"] else progress.skipped_in_row + 1
        if not small["updated"]:
            self._skipped(step, small["grad_norm"])
        if step % train.log_every == 0 or step == train.steps:
            self._log(step, jax.device_get(metrics))

    def _skipped(self, step, grad_norm):
        size, limit = self._config.train.batch_size, self._config.train.max_skipped
        log.warning(
            f"step {step} skipped: loss {self._progress.loss:g}, gradient norm {grad_norm:g}; its "
            f"batch has the sequences {(step - 1) * size} to {step * size - 1} in the run's order"
        )
        if self._progress.skipped_in_row >= limit:
            raise DivergedError(
                f"stopped at step {step}: the last {self._progress.skipped_in_row} updates were "
                "skipped because the loss or the gradient was not finite "
                f"(train.max_skipped={limit}). Look at the data; or, if the model itself is "
                "broken, continue from an earlier checkpoint with --go-back=STEP, or lower "
                "train.learning_rate in another --workdir"
            )

    def _log(self, step, metrics):
        n_steps, seconds = self._end_interval(step)
        self._progress.compute_seconds += seconds["compute"]
        speed = self._speed(n_steps, sum(seconds.values()))
        scalars = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        del scalars["finite"], scalars["updated"]
        layers, experts, balance = layer_metrics(metrics), {}, ""
        if layers:
            load, live = metrics["load"], metrics.get("live")
            scalars["load_spread"] = float(load_spread(load, live))
            scalars["experts_per_token"] = float(load.sum(axis=-1).mean())
            names = ("load_entropy", "confidence_entropy", "dropped_share")
            scalars |= {name: float(layers[name].mean()) for name in names if name in layers}
            experts = {name: metrics[name] for name in ("load", "mean_score")}
            best = np.log(layers.get("live_experts", load.shape[-1])).mean()
            balance = f" | load entropy {scalars['load_entropy']:.3f} of {best:.3f}"
            if n_dead := layers["dead_experts"].sum():
                balance += f", {n_dead} dead experts"
        scalars |= speed | {f"{name}_seconds": s for name, s in seconds.items()}
        scalars |= devices.process_memory() | {"goodput": self._goodput()}
        self._write(step, "train", scalars, layers, experts)
        total, steps = sum(seconds.values()), self._config.train.steps
        waits = ", ".join(f"{name} {seconds[name] / total:.1%}" for name in _IN_SPEED)
        mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        left = timedelta(seconds=round(total / n_steps * (steps - step)))
        log.info(
            f"step {step}/{steps} | loss {scalars['loss']:.4f} | nll {scalars['nll']:.4f}{balance} "
            f"| {speed['tokens_per_second']:,.0f} tokens/s{mfu} | {waits} | {left} left"
        )

    def _end_interval(self, step):
        """Returns `(steps, {clock: seconds})` since the last log line, for the speed."""
        now, clocks = time.perf_counter(), self._seconds - self._line_seconds
        seconds = {name: clocks[name] for name in _IN_SPEED}
        seconds["compute"] = max(now - self._line_time - clocks.total(), 1e-9)
        n_steps = max(step - self._line_step, 1)
        self._seconds["compute"] += seconds["compute"]
        self._line_step, self._line_time = step, now
        self._line_seconds = self._seconds.copy()
        return n_steps, seconds

    def _goodput(self):
        """`compute` time / time since the run first began. Steps lost in a crash do not count."""
        useful = self._progress.compute_seconds
        return useful / max(time.time() - self._began, useful, 1e-9)

    def _speed(self, n_steps, seconds):
        n_devices = jax.device_count()
        tokens = n_steps * self._config.tokens_per_step / seconds
        flops = self._flops_per_token * tokens / n_devices
        found = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / n_devices,
            "flops_per_second_per_device": flops,
        }
        return found | ({"mfu": flops / self._peak} if self._peak else {})

    def validation(self, step, result):
        """Reports an `Evaluation` of the validation split."""
        seconds = self._seconds["evaluation"] - self._evaluated
        self._evaluated = self._seconds["evaluation"]
        scalars = {f"validation_{name}": value for name, value in result.metrics().items()}
        self._write(step, "validation", scalars | {"validation_seconds": seconds}, {}, {})
        duration = timedelta(seconds=round(seconds))
        log.info(f"step {step}/{self._config.train.steps} | validation {result} | in {duration}")

    def sample(self, step, text):
        """Reports a text of the model. In `samples.jsonl` it replaces texts of repeated steps."""
        shown, file = json.dumps(text, ensure_ascii=False), self._folder / "samples.jsonl"
        log.info(f"step {step}/{self._config.train.steps} | sample {shown}")
        if not self._writers:
            return
        self._check()
        with Tolerated(file.name):
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            kept = "".join(line for line in lines if json.loads(line)["step"] < step)
            write_whole(file, f"{kept}{json.dumps({'step': step, 'text': text})}\n".encode())
        for writer, tolerated in self._writers.items():
            if hasattr(writer, "write_text"):
                with tolerated:
                    writer.write_text(step, text)

    def _write(self, *metrics):
        if self._writers:
            self._check()
        for writer, tolerated in self._writers.items():
            with tolerated:
                writer.write(*metrics)

    def sync(self):
        """Waits until `metrics.jsonl` is on the disk. Call it before a checkpoint is saved."""
        if self._lines:
            self._progress.metrics_bytes = self._lines.sync()

    def summary(self, step, total_seconds):
        """The content of `summary.json` after the last step and its validation."""
        counts, seconds, progress = parameter_counts(self._config), self._seconds, self._progress
        metrics = {"step": step, "tokens": step * self._config.tokens_per_step}
        metrics |= {"train_loss": progress.loss, "train_nll": progress.nll}
        metrics["validation_perplexity"] = perplexity(progress.validation["nll"])
        metrics |= {f"validation_{name}": v for name, v in progress.validation.items()}
        in_speed = sum(seconds[name] for name in (*_IN_SPEED, "compute"))
        timing = self._speed(self._line_step - self._start_step, max(in_speed, 1e-9))
        clocks = ("input", "checkpoint", "compute", "evaluation", "compile")
        timing |= {f"{name}_seconds": seconds[name] for name in clocks}
        return {
            "metrics": metrics,
            "parameters": {"total": counts.total, "active": counts.active},
            "timing": timing | {"goodput": self._goodput(), "total_seconds": total_seconds},
            "memory": self._program | devices.process_memory(),
        }

    def close(self):
        while self._writers:
            writer, tolerated = self._writers.popitem()
            with tolerated:
                writer.close()


def in_words(summary):
    """Returns one line of text with the result of a run, given its `summary.json`."""
    metrics = summary["metrics"]
    return (
        f"step {metrics['step']:,}, {metrics['tokens']:,} tokens, validation nll "
        f"{metrics['validation_nll']:.4f}, bits per byte {metrics['validation_bits_per_byte']:.4f}"
    )

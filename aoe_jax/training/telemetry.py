"""The figures of a run: speed, utilisation, memory, time by activity, and the load of experts.

Every `train.log_every` steps they go to the log, as one readable line, and to the writers of
`writers.py`. Below, L is the number of layers and n that of experts.
"""

import contextlib
import logging
import time
from collections import Counter, deque
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from aoe_jax.config.run import Config
from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.storage.retry import Tolerated
from aoe_jax.training.bar import Bar
from aoe_jax.training.load_statistics import layer_statistics, load_spread
from aoe_jax.training.memory import device_memory, host_memory, program_memory
from aoe_jax.training.peaks import peak_flops_per_device
from aoe_jax.training.writers import JsonLines, TensorBoard, Wandb

log = logging.getLogger(__name__)

# Suffixes of the names of measured figures. Two runs of the same steps differ only in these.
MEASURED = ("seconds", "bytes", "per_second", "per_device", "mfu", "goodput")
# A process is slow if it is busy for this share of the time, and for twice the median.
SLOW = 0.1
# A step is slow if it takes a second and 5 times the median of the 64 steps before it.
SLOW_STEP, SLOW_STEP_WINDOW = 5, 64
_IN_SPEED = ("input", "checkpoint")  # the clocks whose time counts in the speed, beside computing


def layer_figures(metrics):
    """Figures of each layer `[L]` by name from the host metrics of a step; none for a dense model.

    They are those of `layer_statistics`; `confidence_entropy` in nats; `mean_score`, the mean over
    experts of AoE's norms or a router's logits; and, if experts have a capacity, `dropped_share`,
    the share of the choices that were dropped.
    """
    load = metrics["load"]
    if load.shape[-1] == 1:
        return {}
    figures = layer_statistics(load, metrics.get("live"))
    figures |= {"mean_score": metrics["mean_score"].mean(axis=-1)}
    names = ("confidence_entropy", "dropped_share")
    return figures | {name: metrics[name] for name in names if name in metrics}


class Telemetry:
    """Measures a run and, in the first process, writes its figures.

    Time counts from `start` on and is split into `input` (the loop waits for the next batch),
    `checkpoint` (the loop waits for a save) and `compute` (the rest). Devices compute while the
    loop waits, so waiting costs at most its seconds. Evaluation does not count in the speed. MFU is
    the useful FLOPs of training over the peak of the chip in bfloat16, also for a run that computes
    in float32; it is left out if the chip is unknown.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        start_step,
        validated=True,
        wandb=None,
        writes=True,
        began=None,
        bar: Bar | None = None,
    ):
        """Opens the files of a run that continues after `start_step` updates. `validated` says
        whether the validation of that step is done, `wandb` is a project of Weights & Biases or
        None, and `writes` is False in all processes but the first. `began` is the time when the run
        began for the first time; None: now. `bar` is closed with the files.
        """
        self._began, self._useful = began or time.time(), 0.0
        self._writers, self._tensorboard = [], None
        if writes:
            self._lines = JsonLines(
                workdir / "metrics.jsonl", start_step, config.checkpoint.every, validated
            )
            self._useful = self._lines.compute_seconds
            self._writers = [self._lines]
            with Tolerated(TensorBoard.name):
                self._tensorboard = TensorBoard(workdir / "tensorboard", start_step)
                self._writers.append(self._tensorboard)
            if wandb is not None:
                self._open_wandb(workdir, wandb, config)
        self._has_bar = bar is not None and bar.shows
        if self._has_bar:
            self._writers.append(bar)
        self._tolerated = {writer: Tolerated(writer.name) for writer in self._writers}
        self._config, self._program = config, {}
        self._flops_per_token = training_flops_per_token(config)
        self._peak = peak_flops_per_device(jax.devices())
        if self._peak is None:
            kind = jax.devices()[0].device_kind
            log.info(
                "no MFU: the peak of %r is unknown, see aoe_jax.training.peaks.PEAK_FLOPS", kind
            )
        self._seconds = Counter()  # seconds of the run by clock; `compute` up to the newest line
        self._start_step = self._line_step = start_step
        self._line_time, self._line_seconds = time.perf_counter(), Counter()
        self._waited = 0.0  # seconds of the clock `device` up to the newest line
        self._evaluated = 0.0  # seconds of evaluation that are reported
        self._step_ended, self._step_clocks = time.perf_counter(), Counter()
        self._steps = deque(maxlen=SLOW_STEP_WINDOW)  # seconds of each
        self._slowest = {}  # seconds of the slowest step that was logged, by its cause

    def _open_wandb(self, workdir, project, config):
        try:
            self._writers.append(Wandb(workdir, project, config.to_dict()))
        except ConnectionError as e:
            log.warning(f"Weights & Biases cannot be reached ({e}); the run goes on without it")

    @contextlib.contextmanager
    def clock(self, name):
        """Counts the time within as `input`, `checkpoint`, `evaluation` or `compile`; or as
        `device`, the time in which the host waits for a step, which is a part of `compute`.
        """
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def start(self, state, step):
        """Begins the time that counts; see `memory.program_memory` for the arguments."""
        self._program = program_memory(state, step)
        log.info(
            f"compiled the train step in {self._seconds['compile']:.1f} s; on each device the "
            f"state takes {_bytes(self._program['state_bytes'])}, "
            f"and a step {_bytes(self._program['temporary_bytes'])} more"
        )
        self._line_time, self._line_seconds = time.perf_counter(), self._seconds.copy()
        self._step_ended, self._step_clocks = self._line_time, self._line_seconds

    def step(self, step):
        """Records the end of a step, and warns if it was slow; again only if it was twice as slow
        as the slowest one with the same cause, so that regular saves are logged once.
        """
        now, clocks = time.perf_counter(), self._seconds - self._step_clocks
        total = now - self._step_ended - clocks["evaluation"] - clocks["compile"]
        self._step_ended, self._step_clocks = now, self._seconds.copy()
        median = np.median(self._steps) if len(self._steps) >= SLOW_STEP_WINDOW // 4 else np.inf
        self._steps.append(total)
        parts = {
            "waiting for input": clocks["input"],
            "saving": clocks["checkpoint"],
            "waiting for the devices or for other processes": clocks["device"],
        }
        parts["elsewhere in this process"] = total - sum(parts.values())
        cause = max(parts, key=parts.get)
        if total > max(SLOW_STEP * median, 1, 2 * self._slowest.get(cause, 0)):
            self._slowest[cause] = total
            log.warning(
                f"step {step} took {total:.1f} s, {parts[cause]:.1f} s of them {cause}; the median "
                f"of the steps before is {median:.2g} s"
            )

    def train(self, step, metrics):
        """Reports host metrics of training step `step`; call it every `log_every` steps."""
        n_steps, seconds = self._end_interval(step)
        self._name_slow_processes(step, seconds)
        if not self._writers:
            return
        speed = self._speed(n_steps, sum(seconds.values()))
        scalars = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        scalars.pop("finite", None)
        layers, experts, balance = layer_figures(metrics), {}, ""
        if layers:
            load, live = metrics["load"], metrics.get("live")
            scalars["load_spread"] = float(load_spread(load, live))
            scalars["experts_per_token"] = float(load.sum(axis=-1).mean())
            names = ("load_entropy", "confidence_entropy", "dropped_share")
            scalars |= {name: float(layers[name].mean()) for name in names if name in layers}
            experts = {name: metrics[name] for name in ("load", "mean_score")}
            best = np.log(layers.get("live_experts", load.shape[-1])).mean()
            balance = f" | load entropy {scalars['load_entropy']:.3f} of {best:.3f}"
        measured = speed | {f"{name}_seconds": s for name, s in seconds.items()}
        self._useful += seconds["compute"]
        measured |= host_memory() | device_memory() | {"goodput": self._goodput()}
        self._write(step, "train", scalars | measured, layers, experts)
        shares = {name: seconds[name] / sum(seconds.values()) for name in _IN_SPEED}
        waits = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        steps = self._config.train.steps
        left = timedelta(seconds=round(sum(seconds.values()) / n_steps * (steps - step)))
        log.log(
            logging.DEBUG if self._has_bar else logging.INFO,  # the bar shows the same
            f"step {step}/{steps} | loss {scalars['loss']:.4f} | nll {scalars['nll']:.4f}{balance} "
            f"| {_speed_in_words(speed)} | {waits} | {left} left",
        )

    def _name_slow_processes(self, step, seconds):
        """Warns of processes for which the others wait; all processes call it together."""
        if jax.process_count() == 1:
            return
        total, waited = sum(seconds.values()), self._seconds["device"] - self._waited
        self._waited = self._seconds["device"]
        mine = np.float32([total - waited, seconds["input"]])
        busy, inputs = multihost_utils.process_allgather(mine).reshape(-1, 2).T
        for process in np.flatnonzero((busy > 2 * np.median(busy)) & (busy > SLOW * total)):
            log.warning(
                f"process {process} is slow: of the {total:.1f} s before step {step} it was busy "
                f"for {busy[process]:.1f} s, {inputs[process]:.1f} s of them waiting for input; "
                f"the median of all processes is {np.median(busy):.1f} s"
            )

    def _end_interval(self, step):
        """Steps and seconds by clock since the last line, without evaluation and compilation."""
        now, clocks = time.perf_counter(), self._seconds - self._line_seconds
        del clocks["device"]
        seconds = {name: clocks[name] for name in _IN_SPEED}
        seconds["compute"] = max(now - self._line_time - clocks.total(), 1e-9)
        n_steps = max(step - self._line_step, 1)
        self._seconds["compute"] += seconds["compute"]
        self._line_step, self._line_time = step, now
        self._line_seconds = self._seconds.copy()
        return n_steps, seconds

    def _goodput(self):
        """The share of the run's time so far that computed steps which were not lost later."""
        return self._useful / max(time.time() - self._began, self._useful, 1e-9)

    def _speed(self, n_steps, seconds):
        n_devices = jax.device_count()
        tokens = n_steps * self._config.tokens_per_step / seconds
        flops = self._flops_per_token * tokens / n_devices
        figures = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_device": tokens / n_devices,
            "flops_per_second_per_device": flops,
        }
        return figures | ({"mfu": flops / self._peak} if self._peak else {})

    def evaluation(self, step, result):
        """Reports an `Evaluation` of the validation split, with a picture of its load."""
        seconds = self._seconds["evaluation"] - self._evaluated
        if self._writers:
            scalars = {f"validation_{name}": value for name, value in result.metrics().items()}
            scalars["validation_seconds"] = seconds
            self._write(step, "validation", scalars, {}, {})
            steps = self._config.train.steps
            duration = timedelta(seconds=round(seconds))
            log.info(f"step {step}/{steps} | validation {result} | in {duration}")
            if self._config.experts.kind != "dense" and self._tensorboard:
                with self.clock("evaluation"):
                    self._draw_load(step, result)
        self._evaluated = self._seconds["evaluation"]

    def _draw_load(self, step, result):
        title = f"{self._config.experts.kind}, validation, step {step}"
        with self._tolerated[self._tensorboard]:
            # matplotlib takes half a second to import.
            from aoe_jax.training.load_statistics import draw_loads, load_statistics

            figure = draw_loads({title: load_statistics(result.stats)})
            self._tensorboard.draw(step, "experts/load", figure)

    def _write(self, *figures):
        for writer in self._writers:
            with self._tolerated[writer]:
                writer.write(*figures)

    def sync(self):
        """Waits until `metrics.jsonl` is on the disk; a checkpoint must be saved after that."""
        if self._writers:
            self._lines.sync()

    def timing(self):
        """Speed and seconds of the whole run: the group `timing` of `summary.json`."""
        seconds = sum(self._seconds[name] for name in (*_IN_SPEED, "compute"))
        figures = self._speed(self._line_step - self._start_step, max(seconds, 1e-9))
        clocks = ("input", "checkpoint", "compute", "evaluation", "compile")
        figures |= {f"{name}_seconds": self._seconds[name] for name in clocks}
        return figures | {"goodput": self._goodput()}

    def memory(self):
        """Memory of the program and of this process: the group `memory` of `summary.json`."""
        return self._program | host_memory() | device_memory()

    def close(self):
        """Flushes and closes the files."""
        while self._writers:
            writer = self._writers.pop()
            with self._tolerated[writer]:
                writer.close()


def _bytes(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _speed_in_words(speed):
    words = (
        f"{speed['tokens_per_second']:,.0f} tokens/s, "
        f"a device {speed['tokens_per_second_per_device']:,.0f} and "
        f"{speed['flops_per_second_per_device'] / 1e12:.3g} TFLOP/s"
    )
    return words + (f", MFU {100 * speed['mfu']:.1f}%" if "mfu" in speed else "")

"""What the runs of a suite have come to: read from their directories, and written as CSV."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aoe_jax.compare.jobs import last_line
from aoe_jax.compare.layout import beside, folder_of, is_finished
from aoe_jax.compare.measuring import step_seconds
from aoe_jax.compare.suite import Run
from aoe_jax.counts import parameter_counts, training_flops_per_token
from aoe_jax.json_files import read_json


@dataclass(frozen=True)
class Curve:
    """A quantity at steps of a run, `[N]` each."""

    step: np.ndarray
    nll: np.ndarray


@dataclass(frozen=True)
class Result:
    """A run and what it has come to; numbers are nan and curves short where it isn't finished."""

    run: Run
    state: str  # finished | diverged, with a validation nll that isn't finite | failed | unfinished
    last_line: str  # of a run that failed
    nll: float  # of the validation split after the last step, nats a token
    bits_per_byte: float
    seconds_per_step: float  # without compiling and validating
    timed_in_turn: bool  # by `step_times`; False: the median over lines of metrics.jsonl
    memory_bytes: float  # what the compiler plans for a device: state and temporaries
    train: Curve
    validation: Curve
    load_entropy: (
        float  # mean over layers, of the validation split; nan where routing wasn't looked at
    )
    dropped_share: float  # of the choices of training batches, of experts with a capacity
    routing: dict | None  # routing.json

    @property
    def tokens_per_step(self):
        """Tokens of a step."""
        return self.run.config.tokens_per_step

    @property
    def tokens(self):
        """Tokens of the whole training."""
        return self.run.config.train.steps * self.tokens_per_step

    @property
    def flops_per_step(self):
        """Useful FLOPs of a step."""
        return training_flops_per_token(self.run.config) * self.tokens_per_step

    @property
    def tokens_per_second(self):
        """Of training steps, by their median."""
        return self.tokens_per_step / self.seconds_per_step

    def per_step(self, axis):
        """What a step costs on an axis: "tokens", "flops" or "seconds"."""
        return {
            "tokens": self.tokens_per_step,
            "flops": self.flops_per_step,
            "seconds": self.seconds_per_step,
        }[axis]


def read_results(runs: Sequence[Run], workdir: Path):
    """The `Result` of each run, in their order."""
    timed = {size: step_seconds(workdir, runs, size) or {} for size in {run.size for run in runs}}
    return [_read(run, folder_of(workdir, run), timed[run.size].get(run.arm)) for run in runs]


def _read(run, folder, seconds_per_step):
    finished = is_finished(folder, run)
    outcome = beside(folder, ".outcome.json")
    ended = read_json(outcome) if outcome.exists() else None
    summary = read_json(folder / "summary.json") if finished else None
    nll = _number(summary, "metrics", "validation_nll")
    state = "failed" if ended else "unfinished"
    if finished:
        state = "finished" if math.isfinite(nll) else "diverged"
    log = beside(folder, ".log")
    lines = _lines(folder / "metrics.jsonl")
    train = [line for line in lines if line.get("loss") is not None]
    validation = [line for line in lines if line.get("validation_nll") is not None]
    own = [run.config.tokens_per_step / line["tokens_per_second"] for line in train]
    routing = folder / "routing.json"
    routing = read_json(routing) if finished and routing.exists() else None
    return Result(
        run=run,
        state=state,
        last_line=(ended or {}).get("last_line", "") or (last_line(log) if log.exists() else ""),
        nll=nll,
        bits_per_byte=_number(summary, "metrics", "validation_bits_per_byte"),
        seconds_per_step=seconds_per_step or float(np.median(own or [math.nan])),
        timed_in_turn=seconds_per_step is not None,
        memory_bytes=_number(summary, "memory", "state_bytes")
        + _number(summary, "memory", "temporary_bytes"),
        train=_curve(train, "nll"),
        validation=_curve(validation, "validation_nll"),
        load_entropy=float(np.mean(routing["checkpoints"][-1]["load_entropy"]))
        if routing
        else math.nan,
        dropped_share=_dropped_share(train),
        routing=routing,
    )


def _lines(path):
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the half line of a killed run
            continue
    return found


def _curve(lines, name):
    return Curve(
        np.array([line["step"] for line in lines], int),
        np.array([line[name] for line in lines], float),
    )


def _number(summary, group, name):
    value = summary[group].get(name) if summary else None
    return math.nan if value is None else float(value)


def _dropped_share(train):
    """The mean over the last tenth of the reported steps."""
    shares = [line["dropped_share"] for line in train if "dropped_share" in line]
    return float(np.mean(shares[-math.ceil(len(shares) / 10) :])) if shares else math.nan


def run_rows(results):
    """A row a run: its settings that matter and its figures."""
    for result in results:
        config, counts = result.run.config, parameter_counts(result.run.config)
        yield {
            "size": result.run.size,
            "arm": result.run.arm,
            "seed": result.run.seed,
            "state": result.state,
            "parameters": counts.total,
            "active_parameters": counts.active,
            "active_non_embedding": counts.active_non_embedding,
            "flops_per_token": training_flops_per_token(config),
            "learning_rate": config.train.learning_rate,
            "steps": config.train.steps,
            "tokens": result.tokens,
            "flops": result.run.flops,
            "validation_nll": result.nll,
            "validation_bits_per_byte": result.bits_per_byte,
            "load_entropy": result.load_entropy,
            "dropped_share": result.dropped_share,
            "seconds_per_step": result.seconds_per_step,
            "tokens_per_second": result.tokens_per_second,
            "memory_bytes": result.memory_bytes,
        }


def curve_rows(results):
    """A row a reported step of a run: of training batches, and of the validation split."""
    for result in results:
        for split, curve in (("train", result.train), ("validation", result.validation)):
            for step, nll in zip(curve.step, curve.nll, strict=True):
                costs = {
                    axis: step * result.per_step(axis) for axis in ("tokens", "flops", "seconds")
                }
                run = result.run
                yield (
                    {
                        "size": run.size,
                        "arm": run.arm,
                        "seed": run.seed,
                        "split": split,
                        "step": step,
                    }
                    | costs
                    | {"nll": nll}
                )


def routing_rows(results):
    """A row a checkpoint and layer of a run."""
    per_layer = (
        "load_entropy",
        "confidence_entropy",
        "max_violation",
        "dead_experts",
        "overlap_with_final",
    )
    for result in results:
        for checkpoint in (result.routing or {}).get("checkpoints", ()):
            for layer in range(len(checkpoint["load"])):
                row = {"size": result.run.size, "arm": result.run.arm, "seed": result.run.seed}
                row |= {"step": checkpoint["step"], "layer": layer}
                row["experts_per_token"] = sum(checkpoint["load"][layer])
                yield row | {name: checkpoint[name][layer] for name in per_layer}


def difference_row(size, arm, to, budget, difference):
    """A row of a paired difference of an arm to another; `budget` says at what: end, flops or
    seconds.
    """
    return {"size": size, "arm": arm, "to": to, "at_equal": budget} | dataclasses.asdict(difference)


def write_csv(path: Path, rows: Iterable[dict]):
    """Writes rows, the names of the first as a header; nothing but an empty file of none."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in rows
        )

"""Ways to balance AoE, on the embedded corpus: L_aux of all tokens, L_aux of an eighth of them, or
a selection bias without a loss.

`python -m benchmarks.balance --workdir=DIR [--seeds=3] [--steps=350] [--json=FILE]` trains each arm
of `configs/tiny.py` once per seed, one after the other. A finished run is not repeated; a stopped
run continues. The seed sets parameters and the order of the data, so runs of one seed are pairs:
differences are to the first arm, seed by seed, with their standard error.
"""

import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.statistics import mean
from aoe_jax.json_files import read_json, read_metrics
from aoe_jax.training.workdir import check_workdir
from benchmarks.timing import configuration, report, run_benchmark

# arm -> (variant of configs/tiny.py, fields of the group `balance`)
LOSS_FREE = {"aux_weight": 0.0, "bias_rate": 0.01}
ARMS = {
    "AoE, L_aux": ("aoe", {"aux_tokens": 1.0}),
    "AoE, L_aux of 1/8": ("aoe", {"aux_tokens": 0.125}),
    "AoE, loss-free": ("aoe", LOSS_FREE),
    "router, L_aux": ("moe", {"aux_tokens": 1.0}),
}
LAST_LINES = 5  # of metrics.jsonl, whose mean is the load entropy

_WORKDIR = flags.DEFINE_string("workdir", None, "a directory for the runs")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each arm", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 350, "training steps of each run", lower_bound=100)


def _run(workdir, variant, balance, seed):
    """Trains unless that is done; returns validation nll and load entropy."""
    train = {"seed": seed, "steps": _STEPS.value}
    check_workdir(workdir, configuration(variant, {"balance": balance, "train": train}))
    if not (workdir / "summary.json").exists():
        command = [
            sys.executable,
            "train.py",
            f"--config=configs/tiny.py:{variant}",
            f"--workdir={workdir}",
        ]
        command += [f"--config.balance.{name}={value}" for name, value in balance.items()]
        command += [f"--config.train.{name}={value}" for name, value in train.items()]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = read_metrics(workdir / "metrics.jsonl")
    entropies = [line["load_entropy"] for line in lines if "load_entropy" in line][-LAST_LINES:]
    nll = read_json(workdir / "summary.json")["metrics"]["validation_nll"]
    return nll, mean(entropies).value


def main():
    root = Path(cli.required(_WORKDIR)).absolute()
    root.mkdir(parents=True, exist_ok=True)
    results = {arm: [] for arm in ARMS}
    for seed in range(_SEEDS.value):
        for arm, (variant, balance) in ARMS.items():
            name = "_".join(re.findall(r"\w+", arm))
            workdir = root / f"{name}_steps{_STEPS.value}_seed{seed}"
            nll, entropy = _run(workdir, variant, balance, seed)
            results[arm].append((nll, entropy))
            print(
                f"seed {seed} {arm:>18}: validation nll {nll:.4f}, load entropy {entropy:.3f}",
                flush=True,
            )
    figures, first = [], results[next(iter(ARMS))]
    for arm, runs in results.items():
        nll, entropy = zip(*runs, strict=True)
        difference = mean([a - b[0] for a, b in zip(nll, first, strict=True)])
        figure = {
            "arm": arm,
            "steps": _STEPS.value,
            "nll": list(nll),
            "mean_nll": mean(nll).value,
            "difference": difference.value,
            "difference_error": difference.error,
            "load_entropy": mean(entropy).value,
            "load_entropy_error": mean(entropy).error,
        }
        figures.append(figure)
        print(
            f"{arm:>18}: validation nll {figure['mean_nll']:.4f}, {figure['difference']:+.4f} +- "
            f"{figure['difference_error']:.4f} to the first; "
            f"load entropy {figure['load_entropy']:.3f} +- {figure['load_entropy_error']:.3f}"
        )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main)

"""A dense model that trains on as it is, as an MoE, and as a whole-gate AoE, on the same tokens.

`python -m benchmarks.upcycling [--seeds=3] [--dense_steps=700] [--steps=400] [--every=100]
[--experts=8] [--top_k=2] [--score_neurons=16] [--noise=0] [--output=DIR] [--json=FILE]` trains a
dense model of the size of `configs/tiny.py` (d_ffn = 256, as wide as one of its experts) on the
embedded corpus, upcycles it as `python -m aoe_jax.convert --upcycle` does, and continues all three
with a new warm-up. A seed sets the dense model, the router, and the order of the data, so runs of a
seed are pairs. With `--output`, the same command goes on after a stop, or trains further seeds. The
table has the validation nll after so many steps of the second part, its mean over seeds, and the
mean difference to the dense model with its standard error. Experts compute `top_k` times what the
dense layer does.
"""

import tempfile
from pathlib import Path

from absl import flags
from tabulate import tabulate

from aoe_jax import cli
from aoe_jax.compare.statistics import mean
from aoe_jax.config.checks import require_flag
from aoe_jax.config.run import Config
from aoe_jax.conversion.exporting import export
from aoe_jax.conversion.upcycling import Upcycling, upcycle
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.storage.files import read_json, read_metrics, write_json
from aoe_jax.training.loop import train
from benchmarks.timing import configuration, report, run_benchmark
from configs import finetune

ARMS = ("dense", "MoE", "AoE")
D_FFN = 256
DECIDING = ("dense_steps", "steps", "every", "experts", "top_k", "score_neurons", "noise")


def upcyclings(seed):
    """The forms of the two models of experts, by arm."""
    given = flags.FLAGS
    sizes = {"n_experts": given.experts, "top_k": given.top_k}
    drawn = {"noise": given.noise, "seed": seed}
    return {
        "MoE": Upcycling("moe", **sizes, **drawn),
        "AoE": Upcycling("aoe", **sizes, score_neurons=given.score_neurons, **drawn),
    }


def check_flags(folder):
    """Raises `UserError` if the runs in `folder` were made with other flags."""
    here = {name: flags.FLAGS[name].value for name in DECIDING}
    file = folder / "flags.json"
    there = read_json(file) if file.exists() else here
    wanted = f"has runs with other flags, {there}; use another folder"
    require_flag(there == here, "output", folder, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, here)


def curves(folder, seed):
    """`{arm: {step: validation nll}}` of one seed; runs and models are written to `folder`."""
    given = flags.FLAGS
    changes = {
        "experts": {"d_ffn": D_FFN},
        "train": {"steps": given.dense_steps, "seed": seed},
    }
    train_to_end(configuration("dense", changes), folder / "run")
    models = {arm: folder / arm for arm in ARMS}
    if not models["dense"].exists():
        export(folder / "run", models["dense"])
    for arm, form in upcyclings(seed).items():
        if not models[arm].exists():
            upcycle(models["dense"], models[arm], form)
    return {arm: curve(model, folder / f"{arm}_run", seed) for arm, model in models.items()}


def train_to_end(config, workdir):
    """Trains, unless an earlier start of this command has done it."""
    if not (workdir / "summary.json").exists():
        train(config, workdir)


def curve(model, workdir, seed):
    """The validation nll of a model by the steps that it has been trained on."""
    given = flags.FLAGS
    config = finetune.get_config(str(model))
    config.data.name = "sotu"
    config.train.update(
        steps=given.steps,
        eval_every=given.every,
        batch_size=8,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        seed=1000 + seed,  # another order of the data than in the first part
    )
    found = {0: evaluate_workdir(model, "validation")["nll"]}
    train_to_end(Config.from_config_dict(config), workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    return found | {
        line["step"]: line["validation_nll"] for line in lines if "validation_nll" in line
    }


def rows(of_seeds):
    """The rows of the table: steps, mean nll by arm, and differences to the dense model."""
    for step in of_seeds[0]["dense"]:
        values = {arm: [curves[arm][step] for curves in of_seeds] for arm in ARMS}
        row = {"steps": step} | {arm: f"{mean(values[arm]).value:.4f}" for arm in ARMS}
        for arm in ARMS[1:]:
            found = mean([a - b for a, b in zip(values[arm], values["dense"], strict=True)])
            row[f"{arm} - dense"] = f"{found.value:+.4f} ± {found.error:.4f}"
        yield row


def main():
    given = flags.FLAGS
    with tempfile.TemporaryDirectory() as scratch:
        folder = cli.path_of(given["output"]) if given.output else Path(scratch)
        check_flags(folder)
        of_seeds = [curves(folder / f"seed_{seed}", seed) for seed in range(given.seeds)]
    print(tabulate(list(rows(of_seeds)), "keys", "github", disable_numparse=True))
    figures = [
        {"seed": seed, "arm": arm, "step": step, "validation_nll": nll}
        for seed, found in enumerate(of_seeds)
        for arm, values in found.items()
        for step, nll in values.items()
    ]
    report(figures)


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "how often all is trained", lower_bound=2)
    flags.DEFINE_integer("dense_steps", 700, "steps of the dense model before it is upcycled", 1)
    flags.DEFINE_integer("steps", 400, "steps of every arm after that", 1)
    flags.DEFINE_integer("every", 100, "steps between two validations", 1)
    flags.DEFINE_integer("experts", 8, "experts of a layer", 2)
    flags.DEFINE_integer("top_k", 2, "experts of a token", 1)
    flags.DEFINE_integer("score_neurons", 16, "neurons of an AoE expert that score", 1)
    flags.DEFINE_float("noise", 0.0, "relative standard deviation of the noise in experts", 0.0)
    flags.DEFINE_string("output", None, "a folder for runs and models; default: none are kept")
    run_benchmark(main)

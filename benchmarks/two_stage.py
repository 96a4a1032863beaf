"""Trains the two-stage classifier of the paper's Appendix B with AoE and with a router MoE, and
shows which expert is chosen for a class that is added later.

`python -m benchmarks.two_stage [--seeds=20] [--steps=1000] [--d_model=32] [--json=FILE]
[--output=DIR]` prints a table. `--json` writes the figures of every seed, and `--output` draws a
figure like the paper's Fig. 5 as `two_stage.png` and `two_stage.svg`.

The model is one layer of two experts with top-1 and a linear head. Inputs are Gaussian with
variance 1: class 1 around +mean, class 2 around -mean, class 3 around 0. Stage one trains on
classes 1 and 2; stage two trains equally long on all three. The table shows, after each stage, the
share of each class that is routed to the expert with most of class 1. It also shows how many seeds
end as in the paper: one AoE expert processes classes 1 and 2, and the other expert processes class
3 (`apart`), while a router divides class 3 between both experts (`spread`).

With top-1 the paper's weight, a softmax over the chosen expert alone, is constantly 1. So the
router receives no gradient and keeps its initial choices, and AoE's choices change only because the
experts' own weights are trained. With the softmax over both experts
(`routing.norm_topk_prob=False`), the chosen score receives a gradient. Both weights are tested.

Three properties hold by construction. AoE's norms for x and for -x are equal, so AoE routes classes
1 and 2 alike. A router's two logits without a bias divide the inputs by a hyperplane through 0, so
half of class 3 is on each side. AoE and the router choose by the direction of x, not by its length.

Letters in shapes: input width d, C = 3 classes, n = 2 experts, S seeds, T inputs.
"""

import dataclasses
import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from aoe_jax import cli
from aoe_jax.compare import pictures
from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.routing import TopK
from aoe_jax.storage.files import make_folder
from aoe_jax.training.picture import COLOURS, WIDTH
from benchmarks.timing import run_benchmark, save

CLASSES, EXPERTS, STAGES = 3, 2, 2
MOST = 0.9  # A class is on an expert if at least this share of the class is routed to it.
# arm -> (experts.kind, routing.norm_topk_prob)
ARMS = {
    "AoE, weight of 1": ("aoe", True),
    "AoE, softmax over both": ("aoe", False),
    "router, weight of 1": ("router", True),
    "router, softmax over both": ("router", False),
}
ENDINGS = {
    "apart": "classes 1 and 2 on one expert, class 3 on the other",
    "one": "all three classes on one expert",
    "spread": "class 3 on both experts",
    "other": "class 3 on one expert, 1 and 2 not together on one",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that the paper does not state. AoE and MoE have equally many parameters."""

    steps: int = 1000  # steps of each stage
    d_model: int = 32
    distance: float = 8.0  # from the mean of class 3 to the other means, in standard deviations
    batch: int = 64
    learning_rate: float = 1e-2
    held_out: int = 1000  # inputs per class for measurements

    def experts(self, kind):
        shape = {"d_ffn": 2 * self.d_model, "d_low": max(1, self.d_model // 4)}
        return ExpertsConfig(kind=kind, n_experts=EXPERTS, top_k=1, **shape)


class Outcome(NamedTuple):
    """Measurements on held-out inputs at the end of a stage."""

    share: jax.Array  # [C, n], the share of each class that is routed to each expert
    accuracy: jax.Array  # [C]


class Classifier(nn.Module):
    """A layer of two experts, top-1, and a linear head: `[T, d] -> (logits [T, C], LayerStats)`."""

    kind: str
    norm_topk_prob: bool
    setting: Setting

    @nn.compact
    def __call__(self, x):
        """`x` is `[T, d]` float32."""
        routing = TopK(self.norm_topk_prob)
        y, stats = ExpertsLayer(self.setting.experts(self.kind), routing, name="experts")(x)
        return nn.Dense(CLASSES, name="head")(y), stats


def draw_inputs(key, label, setting):
    """Draws inputs `[T, d]` float32 of the classes `label [T]`, numbered from 0."""
    direction = jnp.ones(setting.d_model) / math.sqrt(setting.d_model)
    mean = setting.distance * jnp.array([1.0, -1.0, 0.0])[label]
    return mean[:, None] * direction + jax.random.normal(key, (len(label), setting.d_model))


def train(kind, norm_topk_prob, setting, key):
    """Trains both stages of one seed; returns an `Outcome` with a leading axis of stages."""
    model = Classifier(kind, norm_topk_prob, setting)
    init_key, data_key, test_key = jax.random.split(key, 3)
    optimizer = optax.adam(setting.learning_rate)

    def loss(params, x, label):
        logits, _ = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(n_classes, state, key):
        params, moments = state
        label = jnp.arange(setting.batch) % n_classes
        gradient = jax.grad(loss)(params, draw_inputs(key, label, setting), label)
        update, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, update), moments), None

    def outcome_of_class(params, number, key):
        label = jnp.full(setting.held_out, number)
        logits, stats = model.apply({"params": params}, draw_inputs(key, label, setting))
        return Outcome(stats.load, jnp.mean(logits.argmax(axis=1) == label))

    def stage(state, classes_and_key):
        n_classes, key = classes_and_key
        keys = jax.random.split(key, setting.steps)
        state, _ = jax.lax.scan(partial(step, n_classes), state, keys)
        classes = jnp.arange(CLASSES), jax.random.split(test_key, CLASSES)
        return state, jax.lax.map(lambda args: outcome_of_class(state[0], *args), classes)

    params = model.init(init_key, jnp.zeros((setting.batch, setting.d_model)))["params"]
    stages = jnp.array([2, 3]), jax.random.split(data_key)
    return jax.lax.scan(stage, (params, optimizer.init(params)), stages)[1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train_seeds(kind, norm_topk_prob, setting, seeds):
    """Trains all seeds in one program; returns an `Outcome`, in which axis 1 is the stage: `share
    [S, 2, C, n]` and `accuracy [S, 2, C]`.
    """
    # Seeds run one after the other: a batch of seeds compiles more slowly and runs hardly faster.
    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.lax.map(partial(train, kind, norm_topk_prob, setting), keys)


def ending(share):
    """Returns the key of `ENDINGS` that describes `share [C, n]`."""
    share = np.asarray(share)
    if share[2].max() < MOST:
        return "spread"
    first = share[0].argmax()
    if min(share[:2, first]) < MOST:
        return "other"
    return "one" if share[2, first] >= MOST else "apart"


def of_first_expert(share):
    """Selects the shares of the expert with most of class 1: `[S, C, n] -> [S, C]`."""
    first = share[:, 0].argmax(axis=-1)
    return np.take_along_axis(share, first[:, None, None], axis=2)[..., 0]


def _mean_and_error(values):
    return {"mean": values.mean(axis=0).tolist(), "standard_error": stats.sem(values).tolist()}


def summary(arm, outcome):
    """Returns the figures of an arm, ready for JSON, with a dict for each stage."""
    stages = []
    for number in range(STAGES):
        share, accuracy = (np.asarray(a, np.float64)[:, number] for a in outcome)
        counts = Counter(map(ending, share))
        stages.append(
            {
                "stage": number + 1,
                "share": share.tolist(),
                "share_of_first_expert": _mean_and_error(of_first_expert(share)),
                "accuracy": _mean_and_error(accuracy),
                "endings": {name: counts[name] for name in ENDINGS},
            }
        )
    return {"arm": arm, "stages": stages}


def table(figures):
    """Formats the figures as text, a line for each arm and stage, and explains the endings."""
    rows = []
    for figure in figures:
        for stage in figure["stages"]:
            share = stage["share_of_first_expert"]
            row = {"arm": figure["arm"], "stage": stage["stage"]}
            pairs = zip(share["mean"], share["standard_error"], strict=True)
            for number, (mean, error) in enumerate(pairs, 1):
                row[f"share of class {number} [%]"] = f"{100 * mean:.1f} ± {100 * error:.1f}"
            for number, accuracy in enumerate(stage["accuracy"]["mean"], 1):
                unseen = number == 3 and stage["stage"] == 1
                row[f"accuracy {number} [%]"] = "unseen" if unseen else f"{100 * accuracy:.1f}"
            rows.append(row | stage["endings"])
    alignment = ("left", *["right"] * (len(rows[0]) - 1))
    lines = [tabulate(rows, headers="keys", disable_numparse=True, colalign=alignment)]
    lines.append("Shares are of the expert with most of class 1. Seeds are counted by ending:")
    lines += [f"{name}: {text}" for name, text in ENDINGS.items()]
    return "\n".join(lines)


def draw(figures, setting):
    """Draws a `Figure` like the paper's Fig. 5, with a row for each arm, a column for each stage.
    Bars show the mean share of each class on each expert; dots show single seeds.
    """
    figure = Figure(figsize=(WIDTH, 1.2 + 1.7 * len(figures)), layout="constrained")
    axes = figure.subplots(len(figures), STAGES, sharex=True, sharey=True, squeeze=False)
    places = np.arange(CLASSES)
    dots = {"s": 13, "facecolor": "white", "edgecolor": "black", "linewidth": 0.6, "zorder": 3}
    for row, arm in zip(axes, figures, strict=True):
        for ax, stage in zip(row, arm["stages"], strict=True):
            shares = of_first_expert(np.array(stage["share"]))
            mean, name = shares.mean(axis=0), f"stage {stage['stage']}"
            first, other = "the expert that serves most of class 1", "the other expert"
            ax.bar(places, mean, 0.8, color=COLOURS[0], label=first)
            ax.bar(places, 1 - mean, 0.8, bottom=mean, color=COLOURS[4], label=other)
            offsets = np.linspace(-0.3, 0.3, len(shares))[:, None]
            ax.scatter(
                places + offsets, shares, clip_on=False, label="the same in one seed", **dots
            )
            ax.set_title(f"{arm['arm']}: {name}" if stage["stage"] == 1 else name, fontsize=8)
            ax.set_xticks(places, [f"class {c + 1}" for c in places], fontsize=8)
            ax.tick_params(axis="y", labelsize=8)
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f}%")
        row[0].text(2, 0.03, "unseen", ha="center", fontsize=8, color="white")
        row[0].set_ylabel("share of a class", fontsize=8)
    handles, words = axes[0, 0].get_legend_handles_labels()
    # Matplotlib lists the dots first; this moves them after the bars.
    handles, words = handles[1:] + handles[:1], words[1:] + words[:1]
    figure.legend(handles, words, loc="outside lower center", fontsize=8, frameon=False)
    seeds, width, steps = len(shares), setting.d_model, setting.steps
    title = f"Two experts, top-1: {seeds} seeds, d={width}, {steps} steps a stage"
    figure.suptitle(title, fontsize=9)
    return figure


def main():
    given, folder = flags.FLAGS, None
    if given.output:
        folder = cli.path_of(given["output"])
        make_folder(folder, "output")
    setting = Setting(steps=given.steps, d_model=given.d_model)
    figures = [
        summary(arm, train_seeds(*layer, setting, given.seeds)) for arm, layer in ARMS.items()
    ]
    print(table(figures))
    settings = {"seeds": given.seeds, **dataclasses.asdict(setting)}
    save({"setting": settings, "endings": ENDINGS, "figures": figures})
    if folder:
        pictures.save(draw(figures, setting), folder / "two_stage.png")


if __name__ == "__main__":  # defined here, because tests import this file
    flags.DEFINE_integer("seeds", 20, "number of trainings of each layer", lower_bound=2)
    flags.DEFINE_integer("steps", 1000, "training steps of each stage", lower_bound=1)
    about = "width d of the inputs; experts have width 2 d and gates of rank d / 4"
    flags.DEFINE_integer("d_model", 32, about, lower_bound=2)
    flags.DEFINE_string("output", None, "a folder for the picture")
    run_benchmark(main)

"""The two-stage classifier of the paper's Appendix B: what it trains, what is counted, the table
and the picture.

Two things hold by construction. The norms of x and -x are equal, so AoE's choice for classes 1 and
2 is the same. And two logits without a bias divide the inputs by a hyperplane through 0, with half
of class 3 on either side. Both choices depend on the direction of x alone, not on its length.

d input width, C = 3 classes, n = 2 experts, S seeds, T inputs.
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
from matplotlib.figure import Figure

from aoe_jax.config import ExpertsConfig
from aoe_jax.experts.kinds import LAYERS

CLASSES, EXPERTS, STAGES = 3, 2, 2
MOST = 0.9  # of a class: what an expert that serves it gets at least
# arm -> (experts.kind, experts.gate)
ARMS = {
    "AoE, gate=chosen": ("aoe", "chosen"),
    "AoE, gate=all": ("aoe", "all"),
    "router, gate=chosen": ("router", "chosen"),
    "router, gate=all": ("router", "all"),
}
ENDINGS = {
    "apart": "classes 1 and 2 on one expert, class 3 on the other",
    "one": "all three classes on one expert",
    "spread": "class 3 on both experts",
    "other": "class 3 on one expert, 1 and 2 not together on one",
}
COLOURS = ("#0072B2", "#E69F00")  # told apart by the colour-blind, and in grey


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the paper leaves open. Experts of both kinds have equally many parameters (Eq. 5,
    rounded).
    """

    steps: int = 1000  # of each stage
    d_model: int = 32
    distance: float = 8.0  # from the mean of class 3 to those of the others, in standard deviations
    batch: int = 64
    learning_rate: float = 1e-2
    held_out: int = 1000  # inputs of each class to measure on

    def experts(self, kind, gate):
        """The layer's `ExpertsConfig`."""
        shape = {"d_ffn": 2 * self.d_model, "d_low": max(1, self.d_model // 4)}
        return ExpertsConfig(kind=kind, gate=gate, n_experts=EXPERTS, top_k=1, **shape)


class Outcome(NamedTuple):
    """What a seed has come to at the end of a stage, on held-out inputs."""

    share: jax.Array  # [C, n], of each class that each expert serves
    accuracy: jax.Array  # [C]


class Classifier(nn.Module):
    """A layer of two experts, top-1, and a linear head on its output: `[T, d] -> (logits [T, C],
    LayerStats)`.
    """

    kind: str
    gate: str
    setting: Setting

    @nn.compact
    def __call__(self, x):
        """`x [T, d]` float32."""
        y, stats = LAYERS[self.kind](self.setting.experts(self.kind, self.gate), name="experts")(x)
        return nn.Dense(CLASSES, name="head")(y), stats


def draw_inputs(key, label, setting):
    """Inputs `[T, d]` float32 of the classes `label [T]`, numbered from 0."""
    direction = jnp.ones(setting.d_model) / math.sqrt(setting.d_model)
    mean = setting.distance * jnp.array([1.0, -1.0, 0.0])[label]
    return mean[:, None] * direction + jax.random.normal(key, (len(label), setting.d_model))


def train(kind, gate, setting, key):
    """Both stages of one seed: `Outcome` stacked over the stages."""
    model = Classifier(kind, gate, setting)
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
        state, _ = jax.lax.scan(
            partial(step, n_classes), state, jax.random.split(key, setting.steps)
        )
        classes = jnp.arange(CLASSES), jax.random.split(test_key, CLASSES)
        return state, jax.lax.map(lambda args: outcome_of_class(state[0], *args), classes)

    params = model.init(init_key, jnp.zeros((setting.batch, setting.d_model)))["params"]
    stages = jnp.array([2, 3]), jax.random.split(data_key)
    return jax.lax.scan(stage, (params, optimizer.init(params)), stages)[1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train_seeds(kind, gate, setting, seeds):
    """One program for all seeds: `Outcome` of `share [S, 2, C, n]` and `accuracy [S, 2, C]`, axis 1
    the stages.
    """
    # One after the other: as a batch they take longer to compile and hardly less to run.
    return jax.lax.map(
        partial(train, kind, gate, setting), jax.random.split(jax.random.key(0), seeds)
    )


def ending(share):
    """How experts share the classes, a name from `ENDINGS`; `share [C, n]`."""
    share = np.asarray(share)
    if share[2].max() < MOST:
        return "spread"
    first = share[0].argmax()
    if min(share[:2, first]) < MOST:
        return "other"
    return "one" if share[2, first] >= MOST else "apart"


def of_first_expert(share):
    """The shares of the expert that serves most of class 1: `[S, C, n] -> [S, C]`; the other expert
    has the rest.
    """
    first = share[:, 0].argmax(axis=-1)
    return np.take_along_axis(share, first[:, None, None], axis=2)[..., 0]


def _mean_and_error(values):
    """Over seeds, `[S, C]`."""
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return {"mean": values.mean(axis=0).tolist(), "standard_error": error.tolist()}


def summary(arm, outcome):
    """The figures of an arm, JSON-ready: a dict for each stage, see `train_seeds`."""
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
    """Lines of text, one an arm and stage."""
    shares, accuracies = "share that the expert of class 1 serves [%]", "accuracy [%]"
    yield f"{'':<20}      {shares:^45} {accuracies:^21}   {'seeds that end':^28}"
    classes = [f"class {c + 1}" for c in range(CLASSES)]
    heads = (
        "".join(f"{name:^15}" for name in classes)
        + " "
        + "".join(f"{name[-1]:>7}" for name in classes)
    )
    yield f"{'':<20} stage{heads}   " + "".join(f"{name:>7}" for name in ENDINGS)
    for figure in figures:
        for stage in figure["stages"]:
            share, accuracy = stage["share_of_first_expert"], stage["accuracy"]["mean"]
            pairs = zip(share["mean"], share["standard_error"], strict=True)
            shares = "".join(f"{100 * mean:>6.1f} ± {100 * error:<6.1f}" for mean, error in pairs)
            accuracies = [f"{100 * a:>7.1f}" for a in accuracy]
            if stage["stage"] == 1:
                accuracies[2] = f"{'unseen':>7}"
            counts = "".join(f"{n:>7}" for n in stage["endings"].values())
            yield f"{figure['arm']:<20} {stage['stage']:>5}{shares} {''.join(accuracies)}   {counts}"
    yield from (f"{name}: {text}" for name, text in ENDINGS.items())


def draw(figures, setting):
    """A `Figure` like the paper's Fig. 5: by arm and stage, which part of each class which expert
    serves; a dot a seed.
    """
    figure = Figure(figsize=(2.6 * len(figures), 5.6), layout="constrained")
    axes = figure.subplots(STAGES, len(figures), sharex=True, sharey=True, squeeze=False)
    places = np.arange(CLASSES)
    for column, arm in zip(axes.T, figures, strict=True):
        for ax, stage in zip(column, arm["stages"], strict=True):
            shares = of_first_expert(np.array(stage["share"]))
            mean, name = shares.mean(axis=0), f"stage {stage['stage']}"
            ax.bar(
                places, mean, 0.8, color=COLOURS[0], label="the expert that serves most of class 1"
            )
            ax.bar(places, 1 - mean, 0.8, bottom=mean, color=COLOURS[1], label="the other expert")
            offsets = np.linspace(-0.3, 0.3, len(shares))[:, None]
            style = {
                "s": 13,
                "facecolor": "white",
                "edgecolor": "black",
                "linewidth": 0.6,
                "zorder": 3,
                "clip_on": False,
            }
            ax.scatter(places + offsets, shares, **style, label="the same in one seed")
            ax.set_title(f"{arm['arm']}\n{name}" if stage["stage"] == 1 else name, fontsize=10)
            ax.set_xticks(places, [f"class {c + 1}" for c in places])
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f}%")
        column[0].text(2, 0.03, "unseen", ha="center", fontsize=8, color="white")
    for row in axes:
        row[0].set_ylabel("share of a class")
    handles, words = axes[0, 0].get_legend_handles_labels()
    # The points, which Matplotlib names first, come after the bars that they are the same as.
    handles, words = handles[1:] + handles[:1], words[1:] + words[:1]
    figure.legend(handles, words, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"Two experts, top-1: {len(shares)} seeds, d={setting.d_model}, {setting.steps} steps a stage",
        fontsize=11,
    )
    return figure

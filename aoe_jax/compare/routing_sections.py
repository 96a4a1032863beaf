"""The sections of the report on balance and routing; each function takes a `Comparison` and returns
blocks.
"""

import math

import numpy as np

from aoe_jax.compare import routing_figures
from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.document import Heading, Picture, Pictures, Points, Table, Text
from aoe_jax.compare.words import plus_minus, signed
from aoe_jax.experts.kinds import LAYERS


def _last(name, reduce=np.mean):
    """A figure of the last checkpoint over layers, as a function of a `Result`; None where routing
    wasn't looked at.
    """
    return lambda r: float(reduce(r.routing["checkpoints"][-1][name])) if r.routing else None


def _routed(c, size):
    """`{arm: [routing, ...]}` of the finished runs whose routing was looked at."""
    found = {
        arm: [r.routing for r in results if r.routing] for arm, results in c.series(size).items()
    }
    return {arm: routings for arm, routings in found.items() if routings}


def _largest_routed(c):
    """The largest size, if routing was looked at there; else the last where it was; None of none."""
    sizes = [size for size in c.sizes() if _routed(c, size)]
    return c.largest() if c.largest() in sizes else (sizes or [None])[-1]


def _tokens(c):
    """How many tokens routing was looked at on, in words."""
    return (
        "/".join(str(n) for n in sorted({r.routing["tokens"] for r in c.results if r.routing}))
        or "0"
    )


def balance(c: Comparison):
    """Ent_load and nll by what balances the load."""
    rows, sentences = [], []
    for size in c.sizes():
        families = {}
        for arm in c.series(size):
            if c.balance_of(size, arm):
                kind, by = c.balance_of(size, arm)
                families.setdefault(kind, []).append((by, arm))
        for kind, arms in families.items():
            reference, first = arms[0]
            for by, arm in arms:
                entropy = c.spread(size, arm, lambda r: r.load_entropy)
                nll = c.spread(size, arm, lambda r: r.nll)
                to = c.difference(size, arm, to=first)
                difference = "" if arm == first else f"{signed(to)} to {reference}"
                rows.append(
                    [f"{size}: {kind}", by, plus_minus(entropy, 3), plus_minus(nll), difference]
                )
                if arm != first and to.n:
                    before = c.spread(size, first, lambda r: r.load_entropy)
                    sentences.append(
                        f"{kind} at {size}: with {by}, Ent_load is {plus_minus(entropy, 3)}, with {reference} "
                        f"{plus_minus(before, 3)}; nll differs by {signed(to)}."
                    )
    if not rows:
        return []
    n, tokens = max(r.run.config.experts.n_experts for r in c.results), _tokens(c)
    text = (
        f"Ent_load (Eq. 7) is the entropy of the experts' shares of load, mean over layers, on the first {tokens} tokens of "
        f"the validation split: {math.log(n):.3f} in perfect balance of {n} experts."
    )
    head = [
        "size and kind",
        "balanced by",
        "Ent_load",
        "validation nll",
        "difference of nll [95% interval]",
    ]
    blocks = [Heading(2, "Balance of load"), Text(text), Table(head, rows)]
    return [*blocks, Points(sentences)] if sentences else blocks


def load(c: Comparison):
    """Heatmaps of load of the largest size and of the one with most arms, norms through training,
    co-activation.
    """
    size = _largest_routed(c)
    if size is None:
        return []
    routed = _routed(c, size)
    widest = max(c.sizes(), key=lambda size: len(_routed(c, size)))
    pictures = []
    for shown in dict.fromkeys((size, widest)):
        entries = [(c.labels[arm], routings[0]) for arm, routings in _routed(c, shown).items()]
        caption = (
            f"{shown}, first seed: share of load of each expert (columns) in %; right: Ent_load, "
            "Ent_conf of the layer."
        )
        pictures.append(Picture(f"load_{shown}", routing_figures.load_heatmaps(entries), caption))
    first = {arm: routings[0] for arm, routings in routed.items()}
    entries = [(c.labels[arm], routing) for arm, routing in first.items()]
    several = [(label, routing) for label, routing in entries if routing["experts_per_token"] != 1]
    if several:
        caption = (
            f"{size}, first seed, last layer: how often two experts are chosen for one token, over what chance would give "
            "with the same loads."
        )
        pictures.append(Picture("coactivation", routing_figures.coactivation(several), caption))
    for arm, routing in first.items():
        what = LAYERS[routing["kind"]].score_name.removeprefix("mean_")
        if len(routing["checkpoints"]) > 1:
            picture = routing_figures.scores_through_training(routing, what, c.labels[arm])
            n_layers = len(routing["checkpoints"][-1]["load"])
            layers = routing_figures.some_layers(n_layers)
            caption = f"{c.labels[arm]}, {size}, first seed: mean {what} of every expert at the kept checkpoints"
            caption += (
                "."
                if len(layers) == n_layers
                else f"; layers {', '.join(map(str, layers))} of {n_layers}."
            )
            pictures.append(Picture(f"scores_{arm}", picture, caption))
    return [Heading(2, "Load, and norms of experts"), Pictures(pictures)]


def health(c: Comparison, styles):
    """Violations, dead experts, how early choices settle, the oracle."""
    rows, size = [], _largest_routed(c)
    for size_ in c.sizes():
        for arm in _routed(c, size_):

            def of(figure, digits, size_=size_, arm=arm):
                return plus_minus(c.spread(size_, arm, figure), digits)

            rows.append(
                [
                    f"{size_}: {c.labels[arm]}",
                    of(_last("load", lambda load: np.sum(load, axis=1).mean()), 2),
                    of(_last("confidence_entropy"), 3),
                    of(_last("max_violation"), 2),
                    of(_last("dead_experts", np.sum), 1),
                    of(lambda r: _overlap(r, 0), 2),
                    of(lambda r: _overlap(r, 0.5), 2),
                    of(lambda r: _oracle(r, "agreement"), 3) + _chance(_routed(c, size_)[arm][0]),
                    "/".join(of(lambda r, n=n: _oracle(r, n), 2).split(" ")[0] for n in _DISTANCES),
                ]
            )
    if not rows:
        return []
    routed = _routed(c, size)
    text = (
        f"Means over layers and seeds on the first {_tokens(c)} tokens of the validation split. Max violation: the largest "
        "load over the mean load, less 1 (0 where no token has an expert). Settled: the share of a token's final experts "
        "that the first kept checkpoint, and one at half of the training, if there is one, has chosen too. Oracle, on the "
        "first 64 tokens of a batch: the K experts whose weighted sum comes nearest to the mixture of all experts by the "
        "softmax over all scores; agreement is the share of the chosen among them (in brackets by chance); the distances to "
        "that mixture, as shares of its length, are those of the chosen, of the oracle's, and of any K."
    )
    kinds = {routings[0]["kind"] for size_ in c.sizes() for routings in _routed(c, size_).values()}
    text += "".join(
        f" {LAYERS[kind].routing_note}" for kind in sorted(kinds) if LAYERS[kind].routing_note
    )
    kind_of = {
        arm: c.suite.config(size_, arm, 0).experts.kind
        for size_ in c.sizes()
        for arm in c.series(size_)
    }
    aside = [
        c.labels[arm]
        for arm, kind in kind_of.items()
        if kind != "dense" and not LAYERS[kind].selects
    ]
    if aside:
        text += f" Without a row, for no token's scores choose experts there: {'; '.join(aside)}."
    head = "arm|experts a token|Ent_conf|max violation|dead experts, all layers|settled, first|settled, half"
    head += "|oracle agreement|distance chosen/oracle/any"
    names = {
        "max_violation": "max violation",
        "dead_experts": "dead experts a layer",
        "load_entropy": "Ent_load",
        "overlap_with_final": "choices in common with the final ones",
    }
    long = {
        arm: routings
        for arm, routings in routed.items()
        if len(routing_figures.common_steps(routings)) > 1
    }
    pictures = [
        Picture(
            f"health_{name}",
            routing_figures.through_training(long, c.labels, styles, name, words),
            f"{size}: {words}, mean over layers and seeds.",
        )
        for name, words in names.items()
        if long
    ]
    return [
        Heading(2, "Routing health"),
        Text(text),
        Table(head.split("|"), rows),
        Pictures(pictures),
    ]


def _chance(routing):
    """The share of the oracle's experts that a random choice would have too, in brackets; nothing
    without an oracle.
    """
    if routing["oracle"] is None:
        return ""
    return f" ({routing['experts_per_token'] / len(routing['checkpoints'][-1]['load'][0]):.2f})"


_DISTANCES = ("distance_chosen", "distance_oracle", "distance_any")


def _overlap(result, share):
    """With the final choices, of the first checkpoint from a share of the training on, mean over
    layers.
    """
    if not result.routing:
        return None
    checkpoints = result.routing["checkpoints"]
    last = checkpoints[-1]["step"]
    there = next(c for c in checkpoints if c["step"] >= share * last)
    if share and there["step"] > (share + 0.1) * last:
        return None
    return float(np.mean(there["overlap_with_final"]))


def _oracle(result, name):
    oracle = result.routing and result.routing["oracle"]
    return float(np.mean(oracle[name])) if oracle else None

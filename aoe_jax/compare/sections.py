"""The sections of the report on losses and cost; each function takes a `Comparison` and returns
blocks.
"""

import math

from aoe_jax.compare import figures, style
from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.document import Heading, Picture, Pictures, Points, Table, Text
from aoe_jax.compare.statistics import mean
from aoe_jax.compare.words import number, plus_minus, signed
from aoe_jax.counts import capacity_flops_per_token, parameter_counts, training_flops_per_token


def in_words(comparison: Comparison, size, arm):
    """Where an arm stands to its reference: a sentence, or None where no seed has both."""
    found = comparison.difference(size, arm)
    if not found.n:
        return None
    side = "below" if found.value < 0 else "above"
    error = f" ± {found.error:.4f}" if found.n > 1 else ""
    interval = (
        f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.n} seeds"
        if found.n > 1
        else "one seed"
    )
    name, label = comparison.labels[arm], comparison.labels[comparison.reference(arm)]
    return f"{name} is {abs(found.value):.4f}{error} nats {side} {label} at {size} ({interval})."


def matched(c: Comparison):
    """What arms have in common and what they cost."""
    rows = []
    for size in c.suite.sizes:
        for arm in c.suite.arms_of(size):
            config = next(r.run.config for r in c.results if (r.run.size, r.run.arm) == (size, arm))
            counts, tokens = (
                parameter_counts(config),
                config.train.steps * config.tokens_per_step,
            )
            active = counts.active_non_embedding
            rows.append(
                [
                    f"{size}: {c.labels[arm]}",
                    number(counts.total),
                    number(active),
                    number(counts.active),
                    number(training_flops_per_token(config)) + _beside(config),
                    number(tokens),
                    f"{tokens / active:.3g}",
                    f"{config.train.learning_rate:.3g}",
                ]
            )
    head = "arm|parameters|active, no embeddings|active|FLOPs a token|tokens|tokens / active|peak learning rate"
    text = (
        "The arms of a size are equal in total parameters to 1% (Eq. 5 of the paper sets the width of AoE experts), "
        "and see the same data in the same order for each seed. Active parameters and FLOPs are not matched. FLOPs "
        "are the useful ones of a training step, forward and backward, scoring all experts included. The last count "
        "of active parameters, the paper's, has the shared embedding table twice. Active are the parameters of the chosen "
        "experts; AoE also reads Wdown of all others, which its FLOPs count and its active parameters don't."
    )
    arms = dict.fromkeys(
        a for s in c.suite.sizes for a in c.suite.arms_of(s) if c.takes_what_it_needs(s, a)
    )
    if arms:
        labels = "; ".join(c.labels[arm] for arm in arms)
        text += (
            f" How many experts a token has is known from training only (see routing health) in {labels}: here and on the "
            "axes they are counted as K, and the seconds are those of the trained model."
        )
    partly = {}  # share of the tokens: arms
    for r in c.results:
        balance = r.run.config.balance
        if balance.aux_weight and balance.aux_tokens < 1:
            partly.setdefault(balance.aux_tokens, {})[c.labels[r.run.arm]] = True
    for share, labels in partly.items():
        text += f" L_aux takes its mean probabilities from {share:g} of the tokens in {'; '.join(labels)}."
    if any(r.run.config.experts.kind == "capacity" for r in c.results):
        text += (
            " In brackets what experts of limited room compute beside them, for places that may be empty and for sending "
            "tokens there by products; it counts nowhere else."
        )
    return [Heading(2, "What is matched"), Text(text + c.not_matched), Table(head.split("|"), rows)]


def _beside(config):
    """What experts of limited room compute beside the useful FLOPs, in brackets."""
    if config.experts.kind != "capacity":
        return ""
    return f" (+{number(config.model.n_layers * capacity_flops_per_token(config)[1])})"


def losses(c: Comparison, styles):
    """Final losses with paired differences, and the curves."""
    rows, drawn, sentences = [], [], []
    for size in c.sizes():
        for arm, results in c.series(size).items():
            base, found = arm == c.suite.baseline, c.difference(size, arm)
            nll, bits = (
                c.spread(size, arm, lambda r: r.nll),
                c.spread(size, arm, lambda r: r.bits_per_byte),
            )
            difference = "baseline" if base else _difference(c, arm, found)
            rows.append(
                [
                    f"{size}: {c.labels[arm]}",
                    str(len(results)),
                    plus_minus(nll),
                    plus_minus(bits),
                    difference,
                ]
            )
            if not base and found.n:
                # Beside a dense model the others would be hard to tell apart.
                if results[0].run.config.experts.kind != "dense":
                    reference = c.reference(arm)
                    behind = (
                        "" if reference == c.suite.baseline else f"\n(to {c.labels[reference]})"
                    )
                    drawn.append((size, arm, behind, found))
                sentences.append(in_words(c, size, arm))
    head = [
        "arm",
        "seeds",
        "validation nll",
        "bits a byte",
        f"difference to {c.baseline_label} [95% interval]",
    ]
    text = (
        "Nll in nats a token of the whole validation split after the last step: mean and standard error over seeds. "
        "Differences are seed by seed; their interval is Student's t's. No interval is widened for their number."
        f"{c.not_matched}"
    )
    blocks = [Heading(2, "Final validation loss"), Text(text), Points(sentences), Table(head, rows)]
    if drawn:
        picture = figures.differences(drawn, c.labels, styles)
        caption = f"Difference of validation nll to {c.baseline_label}"
        caption += ", or to what a row names," if any(behind for *_, behind, _ in drawn) else ""
        caption += " with 95% intervals; left of 0 is a lower loss."
        if any(r.run.config.experts.kind == "dense" for r in c.results):
            caption += " Dense models: see the table."
        blocks.append(Picture("differences", picture, caption))
    return blocks


def curves(c: Comparison, styles):
    """Loss against tokens, FLOPs and seconds."""
    what = {
        "tokens": "tokens",
        "flops": "useful FLOPs",
        "seconds": "seconds of training steps on this machine",
    }
    pictures = [
        Picture(
            f"loss_{axis}_{size}",
            figures.loss_curves(c.series(size), c.labels, styles, axis),
            f"{size}: loss against {words}. Lines: training batches, means over seeds; points: validation split.",
        )
        for size in c.sizes()
        for axis, words in what.items()
    ]
    return [Heading(2, "Loss during training"), Pictures(pictures)]


def budgets(c: Comparison):
    """Losses at equal FLOPs and at equal seconds."""
    rows, units = [], {"flops": "", "seconds": " s"}
    for size in c.sizes():
        for arm in c.series(size):
            if arm == c.suite.baseline:
                continue
            row = [f"{size}: {c.labels[arm]}"]
            for kind, unit in units.items():
                found, budget = (
                    c.difference(size, arm, kind),
                    c.budget(size, (arm, c.reference(arm)), kind),
                )
                nll = plus_minus(mean(c.nlls(size, arm, kind, budget).values())) if found.n else "-"
                row += [
                    f"{number(budget)}{unit}" if found.n else "-",
                    nll,
                    _difference(c, arm, found),
                ]
            rows.append(row)
    text = (
        f"Each arm against {c.baseline_label}, or the arm that is named, at what the one of the two that takes less has "
        "spent at its end. The loss of the other there is read from its validation curve, linear in the logarithm between "
        "points; its learning rate has not come down by then as that of a run planned for the budget would have. A dash: "
        f"the curve begins later, or what an arm takes is known from training only. {_how_timed(c)}"
    )
    head = ["arm", "FLOPs", "nll there", "difference", "seconds", "nll there", "difference"]
    return (
        [Heading(2, "At equal FLOPs and at equal seconds"), Text(text), Table(head, rows)]
        if rows
        else []
    )


def _difference(c, arm, found):
    """A `Difference` of an arm in a cell; to what, where that isn't the baseline."""
    to = c.reference(arm)
    return signed(found) + (f" to {c.labels[to]}" if found.n and to != c.suite.baseline else "")


def _how_timed(c):
    finished, others = [r for r in c.results if r.state == "finished"], []
    for size in dict.fromkeys(r.run.size for r in finished):
        arms = {r.run.arm: r.timed_in_turn for r in finished if r.run.size == size}
        alone = [c.labels[arm] for arm, timed in arms.items() if not timed]
        if alone:
            others.append(size if len(alone) == len(arms) else f"{size} ({'; '.join(alone)})")
    text = (
        "Seconds are processor seconds of a training step of the trained model on validation text, all arms in turn in one "
        "process on one core."
    )
    if not others:
        return text
    alone = "those of training steps, the median of each run, with what else was at work on the machine, at "
    alone += ", ".join(others)
    return (
        f"{text} But they are {alone}."
        if any(r.timed_in_turn for r in finished)
        else f"Seconds are {alone}."
    )


def cost(c: Comparison):
    """Throughput and memory, in the form of the paper's Table 4."""
    rows, drops = [], any(math.isfinite(r.dropped_share) for r in c.results)
    for size in c.sizes():
        speed, memory = (
            {arm: c.spread(size, arm, figure) for arm in c.series(size)}
            for figure in (lambda r: r.tokens_per_second / 1e3, lambda r: r.memory_bytes / 1e6)
        )
        base = c.suite.baseline
        for arm in c.series(size):
            ratios = [
                f"{of[arm].value / of[base].value:.2f}" if base in of else "-"
                for of in (speed, memory)
            ]
            row = [f"{speed[arm].value:.2f}", ratios[0], f"{memory[arm].value:.1f}", ratios[1]]
            if drops:
                row.append(plus_minus(c.spread(size, arm, lambda r: r.dropped_share), 3))
            rows.append([f"{size}: {c.labels[arm]}", *row])
    label = c.baseline_label
    head = [
        "arm",
        "thousand tokens/s",
        f"to {label}",
        "memory, MB",
        f"to {label}",
        *["choices dropped"] * drops,
    ]
    text = f"{_how_timed(c)} Memory is what the compiler plans for state and temporaries of a step on a device."
    if drops:
        text += " Dropped: the share of the choices that found no room, over the last tenth of the training."
    return [Heading(2, "Throughput and memory"), Text(text), Table(head, rows)]


def styles_of(c: Comparison):
    """The styles of all arms."""
    return style.style_of(c.suite.arms)

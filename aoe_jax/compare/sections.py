"""The sections of the report on losses and cost; each function takes a `Comparison` and returns blocks."""

import math

from aoe_jax.compare import figures, style
from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.document import Heading, Picture, Pictures, Points, Table, Text
from aoe_jax.compare.statistics import mean
from aoe_jax.compare.words import number, plus_minus, signed
from aoe_jax.counts import parameter_counts, training_flops_per_token


def in_words(comparison: Comparison, size, arm):
    """Where an arm stands to the baseline: a sentence, or None where no seed has both."""
    found = comparison.difference(size, arm)
    if not found.n:
        return None
    side = "below" if found.value < 0 else "above"
    error = f" ± {found.error:.4f}" if found.n > 1 else ""
    interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.n} seeds" if found.n > 1 else "one seed"
    name, label = comparison.labels[arm], comparison.baseline_label
    return f"{name} is {abs(found.value):.4f}{error} nats {side} {label} at {size} ({interval})."


def matched(c: Comparison):
    """What arms have in common and what they cost."""
    rows = []
    for size in c.suite.sizes:
        for arm in c.suite.arms_of(size):
            config = next(r.run.config for r in c.results if (r.run.size, r.run.arm) == (size, arm))
            counts, tokens = (
                parameter_counts(config),
                config.train.steps * config.train.batch_size * config.data.seq_len,
            )
            active = counts.active_non_embedding
            rows.append(
                [
                    f"{size}: {c.labels[arm]}",
                    number(counts.total),
                    number(active),
                    number(counts.active),
                    number(training_flops_per_token(config)),
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
        "of active parameters, the paper's, has the shared embedding table twice."
    )
    arms = dict.fromkeys(a for s in c.suite.sizes for a in c.suite.arms_of(s) if c.takes_what_it_needs(s, a))
    if arms:
        text += (
            f" Scores decide how many experts a token has (see routing health) in {'; '.join(c.labels[a] for a in arms)}: "
            "here and on the axes they are counted as K, and the seconds are those of the trained model."
        )
    partly = {}  # share of the tokens: arms
    for r in c.results:
        balance = r.run.config.balance
        if balance.aux_weight and balance.aux_tokens < 1:
            partly.setdefault(balance.aux_tokens, {})[c.labels[r.run.arm]] = True
    for share, labels in partly.items():
        text += f" L_aux takes its mean probabilities from {share:g} of the tokens in {'; '.join(labels)}."
    return [Heading(2, "What is matched"), Text(text + c.not_matched), Table(head.split("|"), rows)]


def losses(c: Comparison, styles):
    """Final losses with paired differences, and the curves."""
    rows, drawn, sentences = [], [], []
    for size in c.sizes():
        for arm, results in c.series(size).items():
            base, found = arm == c.suite.baseline, c.difference(size, arm)
            nll, bits = c.spread(size, arm, lambda r: r.nll), c.spread(size, arm, lambda r: r.bits_per_byte)
            difference = "baseline" if base else signed(found)
            rows.append([f"{size}: {c.labels[arm]}", str(len(results)), plus_minus(nll), plus_minus(bits), difference])
            if not base and found.n:
                # Beside a dense model the others would be hard to tell apart.
                if results[0].run.config.experts.kind != "dense":
                    drawn.append((size, arm, found))
                sentences.append(in_words(c, size, arm))
    head = ["arm", "seeds", "validation nll", "bits a byte", f"difference to {c.baseline_label} [95% interval]"]
    text = (
        "Nll in nats a token of the whole validation split after the last step: mean and standard error over seeds. "
        "Differences are seed by seed; their interval is Student's t's. No interval is widened for their number."
        f"{c.not_matched}"
    )
    blocks = [Heading(2, "Final validation loss"), Text(text), Points(sentences), Table(head, rows)]
    if drawn:
        picture = figures.differences(drawn, c.labels, styles, c.baseline_label)
        caption = (
            f"Difference of validation nll to {c.baseline_label}, with 95% intervals; left of 0 is a lower loss. "
            "Dense models: see the table."
        )
        blocks.append(Picture("differences", picture, caption))
    return blocks


def curves(c: Comparison, styles):
    """Loss against tokens, FLOPs and seconds."""
    what = {"tokens": "tokens", "flops": "useful FLOPs", "seconds": "seconds of training steps on this machine"}
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
    rows = []
    for size in c.sizes():
        for arm in c.series(size):
            cells = []
            for kind in ("flops", "seconds"):
                cells.append("baseline" if arm == c.suite.baseline else signed(c.difference(size, arm, kind)))
            at_budget = [plus_minus(mean(c.nlls(size, arm, kind).values())) for kind in ("flops", "seconds")]
            rows.append([f"{size}: {c.labels[arm]}", at_budget[0], cells[0], at_budget[1], cells[1]])
    spent = "; ".join(
        f"{size}: {number(c.budget(size, 'flops'))} FLOPs, {number(c.budget(size, 'seconds'))} s" for size in c.sizes()
    )
    text = (
        "The budget of a size is what the arm that takes least has spent at its end. Where an arm goes on for "
        "longer, its loss there is read from its validation curve, linear in the logarithm between points; its "
        f"learning rate has not come down by then as that of a run planned for the budget would have. A dash: its curve "
        f"begins later, or what it takes is known from training only. {_how_timed(c)} Budgets: {spent}."
    )
    head = ["arm", "nll at equal FLOPs", "difference", "nll at equal seconds", "difference"]
    return [Heading(2, "At equal FLOPs and at equal seconds"), Text(text), Table(head, rows)]


def _how_timed(c):
    in_turn = {r.run.size: r.timed_in_turn for r in c.results if r.state == "finished"}
    text = (
        "Seconds are processor seconds of a training step of the trained model on validation text, all arms in turn in one "
        "process on one core."
    )
    if all(in_turn.values()):
        return text
    others = ", ".join(size for size, timed in in_turn.items() if not timed)
    alone = f"those of training steps, the median of each run, with what else was at work on the machine, at {others}"
    return f"{text} But they are {alone}." if any(in_turn.values()) else f"Seconds are {alone}."


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
            ratios = [f"{of[arm].value / of[base].value:.2f}" if base in of else "-" for of in (speed, memory)]
            row = [f"{speed[arm].value:.2f}", ratios[0], f"{memory[arm].value:.1f}", ratios[1]]
            if drops:
                row.append(plus_minus(c.spread(size, arm, lambda r: r.dropped_share), 3))
            rows.append([f"{size}: {c.labels[arm]}", *row])
    label = c.baseline_label
    head = ["arm", "thousand tokens/s", f"to {label}", "memory, MB", f"to {label}", *["choices dropped"] * drops]
    text = f"{_how_timed(c)} Memory is what the compiler plans for state and temporaries of a step on a device."
    if drops:
        text += " Dropped: the share of the choices that found no room, over the last tenth of the training."
    return [Heading(2, "Throughput and memory"), Text(text), Table(head, rows)]


def styles_of(c: Comparison):
    """The styles of all arms."""
    return style.style_of(c.suite.arms)

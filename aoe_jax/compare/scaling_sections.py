"""The sections of the report on how losses go with size; each function takes a `Comparison` and
returns blocks.
"""

import math

from aoe_jax.compare import figures
from aoe_jax.compare.analysis import SCALES, Comparison
from aoe_jax.compare.document import Heading, Picture, Pictures, Table, Text
from aoe_jax.compare.statistics import MIN_SIZES_OF_PARABOLA, mean
from aoe_jax.compare.words import number


def scaling(c: Comparison, styles):
    """Final loss over sizes, with fits."""
    blocks, pictures, rows = [Heading(2, "Scaling")], [], []
    for scale, words in SCALES.items():
        points, fits = c.points(scale), c.fits(scale)
        if not points:
            return []
        caption = f"Final validation nll against {words}: means with standard errors, fits with 95% bands."
        picture = figures.scaling(points, fits, c.labels, styles, words)
        pictures.append(Picture(f"scaling_{scale}", picture, caption))
        for arm, fit in fits.items():
            low, high = fit.exponent_interval()
            floor = f"{fit.floor:.3f}" if fit.has_floor else "0, set"
            interval = f" [{low:.4f}, {high:.4f}]" if math.isfinite(low) else ""
            rows.append(
                [
                    c.labels[arm],
                    words,
                    floor,
                    f"{fit.factor:.4g}",
                    f"{fit.exponent:.4f}{interval}",
                    _off_the_fit(fit, points[arm]) if len(points[arm]) > 2 else "-",
                ]
            )
    text = (
        "Fits are nll = floor + factor * x^-exponent, by least squares in log nll; intervals and bands draw the "
        "seeds of each size anew (bootstrap); of two or three seeds a size they are too narrow, and hold the truth in about "
        "seven of ten cases. Fewer than four sizes can't tell a floor from an exponent: it is set "
        "to 0 there, and no loss beyond the sizes that were run should be read from such a fit. Off the fit: by how much "
        "the mean loss of each size, the smallest first, lies above it, in nats. Where that is more than the standard error "
        "of the mean, losses don't follow the fit."
    )
    return [
        *blocks,
        Text(text),
        Pictures(pictures),
        Table(["arm", "x", "floor", "factor", "exponent [95% interval]", "off the fit"], rows),
    ]


def _off_the_fit(fit, groups):
    """By how much the mean loss of each size lies above a fit."""
    return ", ".join(f"{mean(nlls).value - float(fit(x)):+.3f}" for x, nlls in groups.items())


def isoflop(c: Comparison, styles):
    """Loss against active parameters at equal training FLOPs; nothing where fewer than three sizes
    share them.
    """
    pictures, rows = [], []
    for place, sizes in enumerate(c.budgets_of_flops, 1):
        arms = c.isoflops(sizes)
        if not arms:
            continue
        caption = f"{', '.join(sizes)}: final validation nll at equal training FLOPs; means with standard errors, parabolas."
        groups, fits = (
            {arm: getattr(of, name) for arm, of in arms.items()} for name in ("groups", "fit")
        )
        words = SCALES["active_non_embedding"]
        pictures.append(
            Picture(
                f"isoflop_{place}", figures.scaling(groups, fits, c.labels, styles, words), caption
            )
        )
        of_arms = {arm: [size for size in sizes if arm in c.series(size)] for arm in c.suite.arms}
        rows += [
            _isoflop_row(c.labels[arm], own, arms.get(arm))
            for arm, own in of_arms.items()
            if len(own) > 2
        ]
    if not rows:
        return []
    text = (
        "Sizes whose training FLOPs are equal to 10% spend them on parameters or on tokens. All arms of a size see the same "
        "tokens, so that each arm is at FLOPs of its own. The best size is where a parabola in the logarithm of the active "
        "parameters is lowest (three sizes determine it, and leave nothing to judge it by); intervals draw the seeds of "
        "each size anew (of two or three seeds they are too narrow), and are left out where a draw has no minimum. Off the "
        "fit: by how much the mean loss of each size, the smallest first, lies above it, in nats; the least loss is no "
        "surer than that."
    )
    head = [
        "arm",
        "sizes",
        "training FLOPs",
        "best active parameters [95% interval]",
        "nll there",
        "off the fit",
    ]
    return [
        Heading(2, "At equal FLOPs, over sizes"),
        Text(text + c.not_matched),
        Pictures(pictures),
        Table(head, rows),
    ]


def _isoflop_row(label, sizes, of):
    start = [label, ", ".join(sizes)]
    if of is None:
        return [*start, "differ by more than 10%", "-", "-", "-"]
    best, (low, high) = of.fit.minimum(), of.fit.minimum_interval()
    cells = ["none: it is no valley", "-"]
    if math.isfinite(best):
        interval = f" [{number(low)}, {number(high)}]" if math.isfinite(low) else ""
        beyond = "" if min(of.groups) <= best <= max(of.groups) else ", beyond the sizes"
        cells = [f"{number(best)}{interval}{beyond}", f"{of.fit(best):.4f}"]
    misses = _off_the_fit(of.fit, of.groups) if len(of.groups) > MIN_SIZES_OF_PARABOLA else "-"
    return [*start, number(of.flops), *cells, misses]

"""The section of the report on what a training step costs against settings of models."""

import math

import numpy as np

from aoe_jax.compare import figures
from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.document import Heading, Picture, Pictures, Table, Text
from aoe_jax.compare.sweep import SWEPT
from aoe_jax.compare.words import number
from aoe_jax.counts import experts_per_token


def throughput(c: Comparison, costs, styles):
    """Speed and memory along the sweeps, and speed and communication along topologies.

    Args:
      c: what is reported.
      costs: `{name of a sweep: {arm: [Cost, ...]}}`.
      styles: of arms.
    """
    blocks = []
    for is_topology, text in ((False, _MEASURED), (True, _TRACED)):
        names = [name for name in costs if c.suite.throughput[name].is_topology == is_topology]
        names = [name for name in names if c.suite.baseline in costs[name]]
        if names:
            blocks.append(Text(text.format(baseline=c.baseline_label) + c.not_matched))
            blocks.append(Pictures([_picture(c, name, costs[name], styles) for name in names]))
            blocks += [_table(c, name, costs[name]) for name in names]
    for name in costs:
        if c.suite.throughput[name].setting == "experts.top_k":
            blocks += _at_equal_experts(c, costs[name])
    return [Heading(2, "Throughput against settings"), *blocks] if blocks else []


_MEASURED = (
    "Training steps of models as they start, on random tokens: processor seconds on one core, all arms in turn in one "
    "process, medians; on accelerators, seconds. Memory is what the compiler plans for state and temporaries. The arms of a "
    "value are equal in total parameters to 1%. Cells are speed and memory, both over those of {baseline}."
)
_TRACED = (
    "Against chips nothing is measured: virtual devices of one machine share its cores. The training step is traced for "
    "machines that aren't here, parameters split over all their chips and the batch of a chip kept. Speed is the most that "
    "public peak figures of arithmetic, HBM and network allow (`python -m aoe_jax.plan`), of useful FLOPs; received bytes "
    "are those of the collectives in the program. Cells are speed and bytes received, both over those of {baseline}."
)


_EQUAL_EXPERTS = (
    "Steps of the trained models over those of the arm that their differences are to. At equal experts: over a step of that "
    "arm with as many experts a token as the model has at the end of its training (means over layers and seeds), by the "
    "ratios of the sweep over K, linear between its values; a dash beyond them. Experts are counted as in evaluation: "
    "selections that draw whether a token has another one, or give one to tokens without any in evaluation only, have fewer "
    "in the step that is timed: they are slower for their number than it says here."
)


def _at_equal_experts(c, by_arm):
    """Steps against those of an arm with as many experts a token; nothing where the sweep is of
    none of the sizes.
    """
    rows = []
    for size in c.sizes():
        for arm in c.series(size):
            to = c.reference(arm)
            steps = None if arm in by_arm else _steps_by_experts(c, size, to, by_arm.get(to, ()))
            per_token = c.spread(size, arm, _experts_of).value
            timed = {r.timed_in_turn for of in (arm, to) for r in c.finished(size, of)}
            if steps is None or math.isnan(per_token) or len(timed) > 1:
                continue
            ratio = c.spread(size, arm, _seconds).value / c.spread(size, to, _seconds).value
            at_equal = ratio / steps(per_token)
            cells = [f"{ratio:.2f}", f"{at_equal:.2f}" if math.isfinite(at_equal) else "-"]
            rows.append([f"{size}: {c.labels[arm]}", f"{per_token:.2f}", c.labels[to], *cells])
    if not rows:
        return []
    head = ["arm", "experts a token", "a step over that of", "as trained", "at equal experts"]
    return [Heading(3, "Steps at equal experts a token"), Text(_EQUAL_EXPERTS), Table(head, rows)]


def _seconds(result):
    return result.seconds_per_step


def _experts_of(result):
    """Experts a token of a trained model, mean over layers; None of a dense model, and where
    routing wasn't looked at.
    """
    if result.routing:
        # Shares of tokens add up to a whole number but for rounding.
        return round(float(np.sum(result.routing["checkpoints"][-1]["load"], axis=1).mean()), 6)
    config = result.run.config
    return (
        None
        if config.experts.kind == "dense" or config.experts.selects
        else experts_per_token(config)
    )


def _steps_by_experts(c, size, arm, costs):
    """Experts a token -> seconds of a step of an arm over those it has at a size; None if the sweep
    has no such step.
    """
    by_k, config = {cost.x: cost for cost in costs}, c.suite.config(size, arm, 0)
    own = by_k.get(config.experts.top_k)
    if own is None or not c.finished(size, arm) or _step_of(own.config) != _step_of(config):
        return None
    xs = sorted(by_k)
    ratios = [by_k[x].seconds / own.seconds for x in xs]
    return lambda x: float(np.interp(x, xs, ratios, left=math.nan, right=math.nan))


def _step_of(config):
    """What decides how long a step takes."""
    return (
        config.model,
        config.experts,
        config.data.seq_len,
        config.train.batch_size,
        config.train.accumulate,
    )


def _quantities(c, name):
    """`(speed of a Cost, its name, its other quantity, its name)`."""
    if c.suite.throughput[name].is_topology:
        return (
            lambda cost: cost.tokens_per_second / cost.x,
            "tokens/s a chip, at most",
            lambda cost: cost.received_bytes / 1e9,
            "GB received a chip",
        )
    return (
        lambda cost: cost.tokens_per_second,
        "tokens/s",
        lambda cost: cost.memory_bytes / 1e6,
        "memory, MB",
    )


def _to_baseline(c, by_arm, quantity):
    """`{arm: [(x, ratio), ...]}`."""
    base = {cost.x: quantity(cost) for cost in by_arm[c.suite.baseline]}
    return {
        arm: [(cost.x, quantity(cost) / base[cost.x]) for cost in costs if base.get(cost.x)]
        for arm, costs in by_arm.items()
    }


def _picture(c, name, by_arm, styles):
    speed, speed_name, other, other_name = _quantities(c, name)
    sweep = c.suite.throughput[name]
    panels = [
        (
            speed_name,
            True,
            {arm: [(cost.x, speed(cost)) for cost in costs] for arm, costs in by_arm.items()},
        ),
        ("speed, ratio", False, _to_baseline(c, by_arm, speed)),
        (
            other_name,
            False,
            {arm: [(cost.x, other(cost)) for cost in costs] for arm, costs in by_arm.items()},
        )
        if sweep.is_topology
        else ("memory, ratio", False, _to_baseline(c, by_arm, other)),
    ]
    figure = figures.against_setting(panels, c.labels, styles, SWEPT[sweep.setting])
    what = "bounds, not measured" if sweep.is_topology else "measured"
    base, *others = (
        by_arm[arm][0].config for arm in sorted(by_arm, key=lambda arm: arm != c.suite.baseline)
    )
    model = _in_words(base, others, sweep)
    caption = f"Against {SWEPT[sweep.setting]} ({what}); ratios to {c.baseline_label}. {model}."
    return Picture(f"throughput_{name}", figure, caption)


def _in_words(config, others, sweep):
    """The model of the baseline, and the ranks of all arms, but for what is swept."""
    ranks = {of.experts.d_low for of in (config, *others) if of.experts.kind == "aoe"}
    m, e, t, setting = config.model, config.experts, config.train, sweep.setting
    k, n = (
        "K" if setting == "experts.top_k" else e.top_k,
        "n" if setting == "experts.n_experts" else e.n_experts,
    )
    parts = [f"{m.n_layers} layers of width {m.d_model}", f"{k} of {n} experts of width {e.d_ffn}"]
    if ranks and setting != "experts.d_low":
        parts.append(f"r={', '.join(map(str, sorted(ranks)))}")
    if sweep.is_topology:
        parts.append(f"{t.batch_size // config.mesh.fsdp} x {config.data.seq_len} tokens a chip")
    elif setting != "train.batch_size":
        parts.append(f"{t.batch_size} x {config.data.seq_len} tokens")
    return ", ".join([*parts, f"vocabulary {m.vocab_size}", m.dtype])


def _table(c, name, by_arm):
    speed, speed_name, other, other_name = _quantities(c, name)
    base, others = by_arm[c.suite.baseline], [arm for arm in by_arm if arm != c.suite.baseline]
    ratios = [
        {arm: dict(line) for arm, line in _to_baseline(c, by_arm, of).items()}
        for of in (speed, other)
    ]
    rows = [
        [
            f"{cost.x:g}",
            number(speed(cost)),
            number(other(cost)),
            *(
                " / ".join(f"{of[arm][cost.x]:.2f}" for of in ratios)
                if cost.x in ratios[0][arm]
                else "-"
                for arm in others
            ),
        ]
        for cost in base
    ]
    names = [f"{c.baseline_label}: {name}" for name in (speed_name, other_name)]
    return Table(
        [SWEPT[c.suite.throughput[name].setting], *names, *(c.labels[arm] for arm in others)], rows
    )

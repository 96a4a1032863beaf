"""The report of a suite: `report.md`, `report.html`, CSV files and figures.

The prose and most tables are in `templates/report.md.j2`, which reads `Results`; the HTML page is
made from the Markdown. The functions here compute what takes the template more than a few lines.
"""

import dataclasses
import math
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from aoe_jax.compare import figures
from aoe_jax.compare.jobs import beside, read_machines, read_outcome
from aoe_jax.compare.measure import measured_file, sweep_file
from aoe_jax.compare.reading import read_costs, read_results
from aoe_jax.compare.results import ROUTING_DIGITS, RUN_COLUMNS, SCALES, Results
from aoe_jax.compare.runs import check_runs, folder_of, tuned_rates, tuning_nlls
from aoe_jax.compare.statistics import exponent, markdown_table, mean, minimum, number
from aoe_jax.compare.suite import SWEPT, Suite
from aoe_jax.formats.configs import computed_fields
from aoe_jax.model.counts import experts_per_token

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("aoe_jax.compare"), trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters |= {
    "number": number,
    "table": markdown_table,
    "cell": lambda cell: str(cell).replace("|", "\\|"),
}


def write_report(suite: Suite, workdir: Path, command):
    """Writes the report of the results so far, with the `command` that makes it again, and returns
    the path of `report.html`. Raises `UserError` if a run there is of another configuration.
    """
    runs = suite.runs(tuned_rates(suite, workdir))
    check_runs({run: folder_of(workdir, run) for run in runs})
    results, costs = read_results(suite, runs, workdir), read_costs(suite, workdir)
    markdown, pictures = to_markdown(
        results,
        costs,
        machines=read_machines(workdir),
        failed=failed(results, workdir),
        tuning=tuning(results, workdir),
        command=command,
    )
    (workdir / "report.md").write_text(markdown)
    folder, page = workdir / "figures", workdir / "report.html"
    folder.mkdir(exist_ok=True)
    svgs = {name: figures.save(figure, folder / f"{name}.png") for name, figure in pictures.items()}
    page.write_text(to_html(markdown, svgs, f"Comparison: {suite.name}"))
    results.runs[RUN_COLUMNS].to_csv(workdir / "runs.csv", index=False)
    results.curves.to_csv(workdir / "curves.csv", index=False)
    results.routing.to_csv(workdir / "routing.csv", index=False)
    results.differences().to_csv(workdir / "differences.csv", index=False)
    if costs:
        frame = pd.concat(costs.values()).drop(columns="config")
        frame.to_csv(workdir / "throughput.csv", index=False)
    return page


def to_markdown(r: Results, costs, **of_workdir):
    """Renders the report as `(Markdown, {name: Figure})`.

    `costs` are of `read_costs`. `of_workdir` has `machines`, `failed`, `tuning` and `command`; the
    report omits those that are missing.
    """
    pictures = {}

    def picture(name, figure, caption):
        pictures[name] = figure
        return f"![{caption}](figures/{name}.png)\\\n*{caption}*"

    compared = [(size, arm, r.difference(size, arm)) for size, arm in r.pairs]
    configs, reports = r.configs, r.runs["report"].dropna()
    shares = [c.balance.aux_tokens for c in configs.values() if c.balance.aux_weight]
    markdown = TEMPLATES.get_template("report.md.j2").render(
        r=r,
        suite=r.suite,
        base=r.suite.baseline,
        compared=[row for row in compared if row[1] != r.suite.baseline and row[2].n],
        gaps={size: gaps for size in r.sizes if (gaps := r.gaps(size)).size},
        scaling={scale: r.scaling(scale) for scale in SCALES},
        isoflop=[(sizes, found) for sizes in r.isoflop_sizes if (found := r.isoflops(sizes))],
        in_turn=r.finished_runs["timed_in_turn"].any(),
        alone=not_in_turn(r),
        states=states(r),
        balanced=balanced(r),
        routed_sizes=routed_sizes(r),
        sweeps=sweeps(r, costs),
        equal_experts=at_equal_experts(r, costs),
        fields_of_arms=fields_of_arms(r),
        not_causal=not_causal(r),
        without_choice=_labels_of(r, _without_choice),
        data_dependent=_labels_of(r, lambda c: experts_per_token(c) is None),
        aux_tokens={
            share: _labels_of(r, lambda c: c.balance.aux_weight and c.balance.aux_tokens == share)
            for share in shares
            if share < 1
        },
        capacity_flops={
            key: config.model.n_layers * config.routing.wasted_flops(config)[1]
            for key, config in configs.items()
            if config.routing.name == "capacity"
        },
        drops=r.runs["dropped_share"].notna().any(),
        n_experts=max([config.experts.n_experts for config in configs.values()], default=1),
        scales=SCALES,
        routing_tokens="/".join(map(str, sorted({report["tokens"] for report in reports}))),
        kinds={report["kind"] for report in reports},
        routing_digits=ROUTING_DIGITS,
        figures=figures,
        styles=figures.styles_of(r.labels),
        picture=picture,
        mean=mean,
        exponent=exponent,
        minimum=minimum,
        log=math.log,
        misses=_misses,
        **of_workdir,
    )
    return markdown, pictures


def _without_choice(config):
    """Whether a layer has several experts, of which tokens choose none."""
    return config.experts.kind != "dense" and not config.routing.choice(config.experts)


def _labels_of(r, holds):
    arms = [arm for (_, arm), config in r.configs.items() if holds(config)]
    return [r.labels[arm] for arm in dict.fromkeys(arms)]


def _misses(groups, fit):
    return ", ".join(f"{mean(nlls).value - fit(x):+.3f}" for x, nlls in groups.items())


def to_html(markdown, svgs, title):
    """Converts the report to one HTML page with everything in it; `svgs` by picture name."""

    def image(_, tokens, i, options, env):
        name = Path(tokens[i].attrs["src"]).stem
        label = jinja2.filters.escape(tokens[i].content)
        return f'<span role="img" aria-label="{label}">{svgs[name]}</span>'

    converter = MarkdownIt("commonmark", {"html": False, "xhtmlOut": True}).enable("table")
    converter.add_render_rule("image", image)
    body = converter.render(markdown)
    return TEMPLATES.get_template("page.html.j2").render(title=title, body=body)


def states(r: Results):
    counts = r.runs["state"].value_counts()
    others = [name for name in ("diverged", "failed", "unfinished") if name in counts]
    finished = f"{counts.get('finished', 0)} of {len(r.runs)} finished"
    return ", ".join([finished, *(f"{counts[name]} {name}" for name in others)])


def not_causal(r: Results):
    """Describes the arms that are not causal, each at the first size that has it."""
    lines = []
    for run in r.first_runs.drop_duplicates("arm").itertuples():
        found = run.config.routing.causality(run.config.experts)
        when, effect = "", "; its loss may use information from later tokens"
        if found.until_step is not None:
            when, effect = f" before step {found.until_step}", ". Validation is causal"
        elif not r.is_comparable(run.size, run.arm):
            effect = "; its losses are not comparable with others"
        if found.reason:
            lines.append(f"{r.labels[run.arm]}: not causal{when}: {found.reason}{effect}.")
    return lines


def failed(r: Results, workdir: Path):
    """Lists the runs and measurements that failed, and the runs that diverged."""
    rows = []
    for run in r.runs[r.runs["state"].isin(["failed", "diverged"])].itertuples():
        log = f"runs/{run.size}/{run.arm}/seed_{run.seed}.log"
        name = f"{run.size}: {r.labels[run.arm]}, seed {run.seed}"
        rows.append({"run": name, "last line": _as_code(run.last_line), "log": log})
    sizes, names = r.suite.sizes, r.suite.throughput
    measured = [(f"{size}: routing and step times", measured_file(workdir, size)) for size in sizes]
    measured += [(f"throughput {name}", sweep_file(workdir, name)) for name in names]
    for name, file in measured:
        ended = read_outcome(file)
        if ended and ended["status"]:
            log = str(beside(file, ".log").relative_to(workdir))
            rows.append({"run": name, "last line": _as_code(ended["last_line"]), "log": log})
    return rows


def _as_code(line):
    return "`" + line[:200].replace("`", "'").replace("|", "¦") + "`"


def not_in_turn(r: Results):
    found = []
    for size, runs in r.finished_runs.groupby("size", sort=False):
        others = runs[~runs["timed_in_turn"].astype(bool)]["arm"].unique()
        labels = "; ".join(r.labels[arm] for arm in others)
        if len(others):
            found.append(size if len(others) == len(r.arms(size)) else f"{size} ({labels})")
    return found


def balanced(r: Results):
    """Groups arms that differ in balance and tuned rates alone: rows `(size, arm, first arm of its
    group)`. Arms whose tokens choose no experts are left out.
    """
    groups = {}
    for size, arm in r.pairs:
        config = r.configs[size, arm]
        if config.routing.choice(config.experts):
            train = dataclasses.replace(config.train, learning_rate=1.0, final_learning_rate=0.0)
            rest = config.model, config.experts, config.routing, train
            groups.setdefault((size, *rest), []).append(arm)
    return [(key[0], arm, arms[0]) for key, arms in groups.items() for arm in arms]


def routed_sizes(r: Results):
    """Returns the sizes whose load is shown: of the analysed ones the largest and the one with most
    arms. All other figures of routing show the first one.
    """
    sizes = [size for size in r.sizes if r.routed(size)]
    widest = sorted(sizes, key=lambda size: -len(r.routed(size)))
    return list(dict.fromkeys([*sizes[-1:], *widest[:1]]))


def sweeps(r: Results, costs):
    """Returns for each sweep `name`, `figure`, `caption`, and the `rows` of a table."""
    base = r.suite.baseline
    return [_sweep(r, name, frame) for name, frame in costs.items() if (frame["arm"] == base).any()]


def _sweep(r, name, frame):
    sweep, base = r.suite.throughput[name], r.suite.baseline
    setting, label = SWEPT[sweep.setting], r.labels[base]
    speed, other = frame["tokens_per_second"], frame["memory_bytes"].astype(float) / 1e6
    speed_name, other_name, source = "tokens/s", "memory, MB", "measured"
    if sweep.is_topology:
        speed, other = speed / frame["x"], frame["received_bytes"].astype(float) / 1e9
        speed_name, other_name = "tokens/s a chip, at most", "GB received a chip"
        source = "bounds, not measured"
    table = frame.assign(speed=speed, other=other).pivot(
        index="x", columns="arm", values=["speed", "other"]
    )
    speed, other = (table[column][frame["arm"].unique()] for column in ("speed", "other"))
    speed_ratio, other_ratio = (of.div(of[base], axis=0) for of in (speed, other))
    cells = speed_ratio.map("{:.2f}".format) + " / " + other_ratio.map("{:.2f}".format)
    rows = pd.DataFrame(
        {
            setting: [f"{x:g}" for x in speed.index],
            f"{label}: {speed_name}": speed[base].map(number),
            f"{label}: {other_name}": other[base].map(number),
        }
    ).join(cells.mask(speed_ratio.isna(), "-").drop(columns=base).rename(columns=r.labels))
    last = {other_name: other} if sweep.is_topology else {"memory, ratio": other_ratio}
    panels = {speed_name: speed, "speed, ratio": speed_ratio, **last}
    model = _model_in_words(frame, sweep, base)
    return {
        "name": name,
        "is_traced": sweep.is_topology,
        "figure": figures.against_setting(panels, figures.styles_of(r.labels), setting),
        "caption": f"Against {setting} ({source}); ratios to {label}. {model}.",
        "rows": rows[speed[base].notna()],
    }


def _model_in_words(frame, sweep, baseline):
    of_arm = frame.groupby("arm", sort=False)["config"].first()
    config, setting = of_arm[baseline], sweep.setting
    of_aoe = [other.experts for other in of_arm if other.experts.kind == "aoe"]
    ranks = {experts.d_low for experts in of_aoe if experts.low_rank}
    m, e, t = config.model, config.experts, config.train
    k = "K" if setting == "experts.top_k" else e.top_k
    n = "n" if setting == "experts.n_experts" else e.n_experts
    parts = [f"{m.n_layers} layers of width {m.d_model}", f"{k} of {n} experts of width {e.d_ffn}"]
    if ranks and setting != "experts.d_low":
        parts.append(f"r={', '.join(map(str, sorted(ranks)))}")
    if sweep.is_topology:
        parts.append(f"{t.batch_size // config.mesh.fsdp} x {config.data.seq_len} tokens a chip")
    elif setting != "train.batch_size":
        parts.append(f"{t.batch_size} x {config.data.seq_len} tokens")
    return ", ".join([*parts, f"vocabulary {m.vocab_size}", m.dtype])


def at_equal_experts(r: Results, costs):
    """Compares steps with those of the reference arm with as many experts a token. There are rows
    only where a sweep over K has the model of a size.
    """
    rows = []
    for name, frame in costs.items():
        for size, arm in r.pairs if r.suite.throughput[name].setting == "experts.top_k" else ():
            if not (frame["arm"] == arm).any() and r.suite.reference(arm) in r.arms(size):
                rows.append(_equal_row(r, size, arm, frame))
    return [row for row in rows if row]


def _equal_row(r, size, arm, frame):
    to, config = r.suite.reference(arm), r.configs[size, arm]
    experts = r.mean(size, arm, "experts_per_token").value
    if _without_choice(config):
        experts = experts_per_token(config)
    swept, own = frame[frame["arm"] == to].set_index("x").sort_index(), r.configs[size, to]
    k = own.experts.top_k
    is_swept = k in swept.index and _step_of(swept.loc[k, "config"]) == _step_of(own)
    timed = {*r.finished(size, arm)["timed_in_turn"], *r.finished(size, to)["timed_in_turn"]}
    if math.isnan(experts) or not is_swept or len(timed) > 1:
        return None
    own_seconds, to_seconds = (r.mean(size, one, "seconds_per_step").value for one in (arm, to))
    ratio, seconds = own_seconds / to_seconds, swept["seconds_per_step"]
    at_experts = np.interp(experts, seconds.index, seconds / seconds[k], math.nan, math.nan)
    return {
        "arm": f"{size}: {r.labels[arm]}",
        "experts a token": f"{experts:.2f}",
        "relative to a step of": r.labels[to],
        "as trained": f"{ratio:.2f}",
        "at equal experts": "-" if math.isnan(at_experts) else f"{ratio / at_experts:.2f}",
    }


def _step_of(config):
    train = config.train
    shape = config.data.seq_len, train.batch_size, train.accumulate
    return config.model, config.experts, config.routing, shape


def tuning(r: Results, workdir: Path):
    """Shows the validation nll of each tried learning rate; None without a tuning."""
    if r.suite.tuning is None:
        return None
    rates, chosen = r.suite.tuning.learning_rates, tuned_rates(r.suite, workdir)
    rows = [
        {"arm": r.labels[arm]}
        | {f"{rate:g}": _tuned_cell(nll) for rate, nll in nlls.items()}
        | {"chosen": _chosen_cell(chosen[arm], nlls.values())}
        for arm, nlls in tuning_nlls(r.suite, workdir).items()
    ]
    return {"rows": rows, "at_the_edge": bool({*chosen.values()} & {min(rates), max(rates)})}


def _chosen_cell(rate, nlls):
    if None in nlls:
        return "waits"
    return "none" if rate is None else f"{rate:g}"


def _tuned_cell(nll):
    if nll is None:
        return "not finished"
    return f"{nll:.4f}" if math.isfinite(nll) else "diverged"


def fields_of_arms(r: Results):
    lines = []
    for run in r.first_runs.drop_duplicates("arm").itertuples():
        groups, computed = run.config.to_dict(), computed_fields(run.config)
        fields = {name: value for name, value in computed.items() if name.startswith("experts.")}
        fields |= {f"balance.{name}": value for name, value in groups["balance"].items()}
        fields = {name: value for name, value in fields.items() if value}
        if run.config.train.scoring_rate != 1:
            fields["train.scoring_rate"] = run.config.train.scoring_rate
        fields |= {f"routing.{name}": value for name, value in groups["routing"].items()}
        shown = ", ".join(f"{name}={value}" for name, value in fields.items())
        lines.append(f"{r.labels[run.arm]}: {shown}.")
    return lines

"""Writes the report of a suite: `report.md`, `report.html`, `table.md` and `table.tex` for a paper,
CSV files and pictures.

The text and most tables are in `templates/report.md.j2`, which is rendered with `Results`. The HTML
page is made from the Markdown. This module computes what would be too long for the template.
"""

from base64 import b64encode
from pathlib import Path

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from aoe_jax.compare import pictures
from aoe_jax.compare.jobs import read_machines, read_outcome
from aoe_jax.compare.results import (
    ROUTING_DIGITS,
    RUN_COLUMNS,
    SCALES,
    Results,
    read_costs,
    read_results,
)
from aoe_jax.compare.statistics import markdown_table, mean, number
from aoe_jax.compare.suite import Suite
from aoe_jax.compare.train_runs import check_runs, folder_of

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("aoe_jax.compare"), trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters |= {
    "number": number,
    "table": markdown_table,
    "cell": lambda cell: str(cell).replace("|", "\\|"),
}


def write_report(suite: Suite, workdir: Path, command):
    """Writes the report of all runs that exist, and returns the path of `report.html`.

    The report contains `command`, which writes it again. Raises `UserError` if a run in `workdir`
    does not have the configuration that the suite gives it.
    """
    check_runs({run: folder_of(workdir, run) for run in suite.runs()})
    results, costs = read_results(suite, workdir), read_costs(suite, workdir)
    of_workdir = {"machines": read_machines(workdir), "failed": failed(results, workdir)}
    markdown, drawn = to_markdown(results, costs, command=command, **of_workdir)
    (workdir / "report.md").write_text(markdown)
    frame = paper_table(results)
    (workdir / "table.md").write_text(frame.to_markdown(index=False) + "\n")
    latex = frame.to_latex(index=False, escape=True)
    (workdir / "table.tex").write_text(latex.replace("±", r"$\pm$"))
    folder, page = workdir / "figures", workdir / "report.html"
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        pictures.save(figure, folder / f"{name}.png")
    page.write_text(to_html(markdown, workdir, f"Comparison: {suite.name}"))
    tables = {
        "runs": results.runs[[*RUN_COLUMNS, "max_violation", "experts_per_token"]],
        "curves": results.curves,
        "routing": results.routing,
        "differences": results.differences(),
    }
    if costs:
        tables["throughput"] = pd.concat(costs.values()).drop(columns="config")
    for name, frame in tables.items():
        frame.to_csv(workdir / f"{name}.csv", index=False)
    return page


def paper_table(r: Results):
    """Returns a table for a paper: the final validation nll of each arm at each size, with standard
    errors over seeds, and its paired difference.
    """
    rows = []
    for arm in {arm: None for _, arm in r.pairs}:
        row = {"method": r.labels[arm]}
        for size in r.sizes:
            row[f"{size}: nll"] = r.mean(size, arm, "validation_nll").text(3)
            is_compared = arm != r.suite.baseline and arm in r.arms(size)
            found = r.difference(size, arm) if is_compared else mean([])
            row[f"{size}: difference"] = found.as_difference()
        rows.append(row)
    return pd.DataFrame(rows)


def to_markdown(r: Results, costs, **of_workdir):
    """Renders the report as `(Markdown, {name: Figure})`.

    `costs` is the result of `read_costs`. `of_workdir` may have `machines`, `failed` and `command`;
    the report omits the missing ones.
    """
    drawn = {}

    def picture(name, figure, caption):
        drawn[name] = figure
        return f"![{caption}](figures/{name}.png)\\\n*{caption}*"

    differences = r.differences()
    at_end = differences[differences["at_equal"] == "end"] if len(differences) else differences
    compared = [(size, arm, r.difference(size, arm)) for size, arm in r.pairs]
    markdown = TEMPLATES.get_template("report.md.j2").render(
        r=r,
        suite=r.suite,
        base=r.suite.baseline,
        p_holm={(row.size, row.arm): f"{row.p_holm:.2g}" for row in at_end.itertuples()},
        compared=[row for row in compared if row[1] != r.suite.baseline and row[2].n],
        scaling={scale: r.scaling(scale) for scale in SCALES},
        in_turn=r.finished_runs["timed_in_turn"].all(),
        routed_sizes=[size for size in r.sizes if r.routed(size)],
        sweeps=[sweep_of(r, name, frame) for name, frame in costs.items()],
        not_causal=not_causal(r),
        drops=r.runs["dropped_share"].notna().any(),
        scales=SCALES,
        routing_digits=ROUTING_DIGITS,
        pictures=pictures,
        styles=pictures.styles_of(r.labels),
        picture=picture,
        mean=mean,
        **of_workdir,
    )
    return markdown, drawn


def to_html(markdown, workdir, title):
    """Converts the report to one HTML page that contains its pictures as SVG."""

    def image(_, tokens, i, options, env):
        svg = (workdir / tokens[i].attrs["src"]).with_suffix(".svg").read_bytes()
        label = jinja2.filters.escape(tokens[i].content)
        return f'<img alt="{label}" src="data:image/svg+xml;base64,{b64encode(svg).decode()}">'

    converter = MarkdownIt("commonmark", {"html": False, "xhtmlOut": True}).enable("table")
    converter.add_render_rule("image", image)
    body = converter.render(markdown)
    return TEMPLATES.get_template("page.html.j2").render(title=title, body=body)


def not_causal(r: Results):
    """Describes every arm that is not causal, by its configuration at the first size with a run."""
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
    """Returns table rows for the runs and measurements that failed and the runs that diverged."""
    rows = []
    for run in r.runs[r.runs["state"].isin(["failed", "diverged"])].itertuples():
        log = f"runs/{run.size}/{run.arm}/seed_{run.seed}.log"
        name = f"{run.size}: {r.labels[run.arm]}, seed {run.seed}"
        rows.append({"run": name, "last line": _as_code(run.last_line), "log": log})
    for file in sorted(workdir.glob("measured/*.json.outcome.json")):
        name = file.name.removesuffix(".json.outcome.json")
        ended = read_outcome(workdir / "measured" / f"{name}.json")
        if ended["status"]:
            row = {"run": f"measuring {name}", "last line": _as_code(ended["last_line"])}
            rows.append(row | {"log": f"measured/{name}.json.log"})
    return rows


def _as_code(line):
    return "`" + line[:200].replace("`", "'").replace("|", "¦") + "`"


def sweep_of(r, name, frame):
    """Returns "name", "figure", "caption" and table "rows" of a sweep; `frame` has its costs."""
    setting, base = r.suite.throughput[name].setting, r.suite.baseline
    label, arms = r.labels[base], frame["arm"].unique()
    table = frame.pivot(index="x", columns="arm", values=["tokens_per_second", "memory_bytes"])
    speed, megabytes = table["tokens_per_second"][arms], table["memory_bytes"][arms] / 1e6
    speed_ratio, memory_ratio = (of.div(of[base], axis=0) for of in (speed, megabytes))
    cells = speed_ratio.map("{:.2f}".format) + " / " + memory_ratio.map("{:.2f}".format)
    of_base = {
        setting: [f"{x:g}" for x in speed.index],
        f"{label}: tokens/s": speed[base].map(number),
        f"{label}: memory, MB": megabytes[base].map(number),
    }
    others = cells.mask(speed_ratio.isna(), "-").drop(columns=base).rename(columns=r.labels)
    panels = {"tokens/s": speed, "speed, ratio": speed_ratio, "memory, ratio": memory_ratio}
    config = frame[frame["arm"] == base]["config"].iloc[0]
    model = f"{config.model.n_layers} layers of width {config.model.d_model}, {config.model.dtype}"
    return {
        "name": name,
        "figure": pictures.against_setting(panels, pictures.styles_of(r.labels), setting),
        "caption": f"Against {setting}; ratios to {label}. {model}.",
        "rows": pd.DataFrame(of_base).join(others)[speed[base].notna()],
    }

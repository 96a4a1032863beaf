"""The report of a suite: `report.md`, `report.html`, CSV files and figures.

The prose and most tables are in `templates/report.md.j2`, which reads `Results`. The functions here
add the figures and what takes more than a few lines to compute. The HTML page is made from the
Markdown.
"""

import dataclasses
import math
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from aoe_jax.compare import figures
from aoe_jax.compare.jobs import PACKAGES, beside, machines_of
from aoe_jax.compare.measure import measured_file, sweep_file
from aoe_jax.compare.reading import COST_COLUMNS, read_costs, read_results
from aoe_jax.compare.results import (
    CURVE_COLUMNS,
    ROUTING_DIGITS,
    RUN_COLUMNS,
    SCALES,
    Results,
)
from aoe_jax.compare.runs import check_run, folder_of, tuned_rates, tuning_nlls
from aoe_jax.compare.statistics import markdown_table, mean, number
from aoe_jax.compare.suite import SWEPT, Suite
from aoe_jax.counts import experts_per_token
from aoe_jax.formats.configs import computed_fields
from aoe_jax.json_files import read_json

BALANCED_BY = {  # methods that balance load, or couple router and experts, by themselves
    "expert_choice": "expert choice",
    "threshold": "thresholds",
    "routing_free": "its own losses",
    "gshard": "its loss of first choices",
    "erc": "L_ERC",
}


def write_report(suite: Suite, workdir: Path, command):
    """Writes the report of the results so far.

    Args:
      suite: the suite.
      workdir: its directory, with a `machine.json`.
      command: the command line that makes the report.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: a run there is of another configuration.
    """
    runs = suite.runs(tuned_rates(suite, workdir))
    for run in runs:
        check_run(folder_of(workdir, run), run)
    results = read_results(suite, runs, workdir)
    costs = read_costs(suite, workdir)
    sections = all_sections(results, costs) | {
        **describe_runs(results, workdir),
        "failed": failed(results, workdir),
        "tuning": tuning(results, workdir),
        "command": command,
    }
    markdown, pictures = to_markdown(results, sections)
    (workdir / "report.md").write_text(markdown)
    folder, page = workdir / "figures", workdir / "report.html"
    folder.mkdir(exist_ok=True)
    svgs = {name: figures.save(figure, folder / f"{name}.png") for name, figure in pictures.items()}
    page.write_text(to_html(markdown, svgs, f"Comparison: {suite.name}"))
    frames = {
        "runs": results.runs[RUN_COLUMNS],
        "curves": results.curves[CURVE_COLUMNS],
        "routing": results.routing,
        "differences": results.differences(),
        "throughput": costs[COST_COLUMNS],
    }
    for name, frame in frames.items():
        frame.to_csv(workdir / f"{name}.csv", index=False)
    return page


def all_sections(r: Results, costs: pd.DataFrame):
    """Computes what the template needs beside `Results`, from the results and `read_costs`."""
    pairs = [(size, arm) for size, arm in r.pairs if arm != r.suite.baseline]
    compared = [(size, arm, r.difference(size, arm)) for size, arm in pairs]
    isoflop = [(sizes, r.isoflops(sizes)) for sizes in r.isoflop_sizes]
    return exceptions(r) | {
        "compared": [(size, arm, found) for size, arm, found in compared if found.n],
        "scaling": {scale: r.scaling(scale) for scale in SCALES},
        "isoflop": [(sizes, found) for sizes, found in isoflop if found],
        "timing": timing(r),
        "balanced": balanced(r),
        "routed_sizes": routed_sizes(r),
        "sweeps": sweeps(r, costs),
        "equal_experts": at_equal_experts(r, costs),
        "fields_of_arms": fields_of_arms(r),
    }


def to_markdown(r: Results, sections):
    """Renders the report.

    Args:
      r: the results.
      sections: `all_sections` and what the working directory tells.

    Returns:
      `(Markdown, {name: Figure})`.
    """
    pictures = {}

    def picture(name, figure, caption):
        pictures[name] = figure
        return f"![{caption}](figures/{name}.png)\\\n*{caption}*"

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aoe_jax.compare"), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["table"] = markdown_table
    environment.filters["cell"] = lambda cell: str(cell).replace("|", "\\|")
    tokens = sorted({report["tokens"] for report in r.reports.values()})
    kinds = {report["kind"] for report in r.reports.values()}
    common = {
        "r": r,
        "suite": r.suite,
        "base": r.suite.baseline,
        "unmatched": [arm.label for arm in r.suite.arms.values() if not arm.matched],
        "drops": r.runs["dropped_share"].notna().any(),
        "n_experts": max([config.experts.n_experts for config in r.configs.values()], default=1),
        "scales": SCALES,
        "routing_tokens": "/".join(map(str, tokens)),
        "kinds": kinds,
        "routing_digits": ROUTING_DIGITS,
        "first_runs": r.runs.drop_duplicates(["size", "arm"]).to_dict("records"),
        "figures": figures,
        "styles": figures.styles_of(r.suite.arms),
        "picture": picture,
        "mean": mean,
        "log": math.log,
        "misses": _misses,
        "sizes_of_arms": lambda sizes: [
            (arm, [size for size in sizes if arm in r.arms(size)]) for arm in r.suite.arms
        ],
    }
    template = environment.get_template("report.md.j2")
    return template.render(common | sections), pictures


def _misses(groups, fit):
    return ", ".join(f"{mean(nlls).value - fit(x):+.3f}" for x, nlls in groups.items())


def to_html(markdown, svgs, title):
    """Converts the report to one HTML page with everything in it; `svgs` by picture name."""

    def image(renderer, tokens, i, options, env):
        name = Path(tokens[i].attrs["src"]).stem
        label = jinja2.filters.escape(tokens[i].content)
        return f'<span role="img" aria-label="{label}">{svgs[name]}</span>'

    converter = MarkdownIt("commonmark", {"html": False, "xhtmlOut": True}).enable("table")
    converter.renderer.rules["image"] = lambda *args: image(converter.renderer, *args)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("aoe_jax.compare"))
    page = environment.get_template("page.html.j2")
    return page.render(title=title, body=converter.render(markdown))


def describe_runs(r: Results, workdir: Path):
    """Describes the states of the runs and the machines."""
    machines, runs = machines_of(workdir), r.runs
    counts = runs["state"].value_counts()
    parts = [f"{counts.get('finished', 0)} of {len(runs)} finished"]
    for state in ("diverged", "failed", "unfinished"):
        if state in counts:
            parts.append(f"{counts[state]} {state}")
    finished = runs[runs["state"] == "finished"]
    hours = (finished["seconds_per_step"] * finished["steps"]).sum() / 3600
    return {
        "states": ", ".join(parts),
        "hours": f"{hours:.2f}",
        "on_cpu": machines[-1]["backend"] == "cpu",
        "machines": [_in_words(machine) for machine in machines],
    }


def _in_words(machine):
    is_cpu = machine["backend"] == "cpu"
    place = f"{machine['cores']} cores" if is_cpu else f"{machine['devices']} devices"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    commit = f"; aoe_jax at {machine['commit']}" if machine.get("commit") else ""
    return f"{machine['device']}, {place}; {versions}{commit}"


def exceptions(r: Results):
    """Names the arms that a reader of the tables must know about."""
    not_causal, without_choice, data_dependent, aux_tokens, capacity = {}, {}, {}, {}, {}
    for (size, arm), config in r.configs.items():
        label, routing, balance = r.labels[arm], config.routing, config.balance
        if arm not in not_causal:
            not_causal[arm] = _not_causal(r, size, arm)
        if config.experts.kind != "dense" and not routing.choice(config.experts):
            without_choice[label] = True
        if r.depends_on_data(size, arm):
            data_dependent[label] = True
        if balance.aux_weight and balance.aux_tokens < 1:
            aux_tokens.setdefault(f"{balance.aux_tokens:g}", {})[label] = True
        if routing.name == "capacity":
            capacity[size, arm] = config.model.n_layers * routing.wasted_flops(config)[1]
    return {
        "not_causal": [line for line in not_causal.values() if line],
        "without_choice": list(without_choice),
        "data_dependent": list(data_dependent),
        "aux_tokens": aux_tokens,
        "capacity_flops": capacity,
    }


def _not_causal(r, size, arm):
    config, label = r.configs[size, arm], r.labels[arm]
    reason, until, *_ = dataclasses.astuple(config.routing.causality(config.experts))
    if until is not None:
        return f"{label}: not causal before step {until}: {reason}. Validation is causal."
    effect = "its loss may use information from later tokens"
    if not r.is_comparable(size, arm):
        effect = "its losses are not comparable with others"
    return f"{label}: not causal: {reason}; {effect}." if reason else None


def failed(r: Results, workdir: Path):
    """Lists the runs and measurements that failed, and the runs that diverged."""
    rows = []
    for run in r.runs[r.runs["state"].isin(["failed", "diverged"])].itertuples(index=False):
        size, arm, seed = run[:3]
        why = run.last_line[:200]
        if run.state == "diverged":
            why = "diverged: its validation nll is not finite"
        log = f"runs/{size}/{arm}/seed_{seed}.log"
        rows.append({"run": f"{size}: {r.labels[arm]}, seed {seed}", "last line": why, "log": log})
    measured = {
        f"{size}: routing and step times": measured_file(workdir, size) for size in r.suite.sizes
    }
    measured |= {f"throughput {name}": sweep_file(workdir, name) for name in r.suite.throughput}
    for name, file in measured.items():
        outcome = beside(file, ".outcome.json")
        ended = read_json(outcome) if outcome.exists() else {"status": 0}
        if ended["status"]:
            log = str(beside(file, ".log").relative_to(workdir))
            rows.append({"run": name, "last line": ended["last_line"][:200], "log": log})
    return rows


def timing(r: Results):
    """Says which steps were timed in turn, and names the others by size and arm."""
    finished, alone = r.runs[r.runs["state"] == "finished"], []
    for size, of_size in finished.groupby("size", sort=False):
        others = of_size[~of_size["timed_in_turn"].astype(bool)]["arm"].unique()
        labels = "; ".join(r.labels[arm] for arm in others)
        if len(others):
            alone.append(size if len(others) == len(r.arms(size)) else f"{size} ({labels})")
    return {"in_turn": finished["timed_in_turn"].any(), "alone": alone}


def balanced(r: Results):
    """Groups the arms of each size by kind of layer.

    Returns:
      `[(size, arm, kind of layer, balancing method, first arm of its kind, the first's method)]`.
    """
    rows = []
    for size in r.sizes:
        kinds = {}
        for arm in r.arms(size):
            if words := balance_of(r, size, arm):
                kinds.setdefault(words[0], []).append((arm, words[1]))
        for kind, members in kinds.items():
            rows += [(size, arm, kind, method, *members[0]) for arm, method in members]
    return rows


def balance_of(r: Results, size, arm):
    """Returns `(kind of layer, balancing methods)` in words; None for arms without a choice."""
    config = r.configs[size, arm]
    b, e, routing = config.balance, config.experts, config.routing
    if not routing.choice(e):
        return None
    default_k = r.configs[size, r.suite.baseline].experts.top_k
    kinds = {"aoe": f"AoE, r={e.d_low}", "router": "MoE"}
    if e.kind == "capacity":
        kinds["capacity"] = f"MoE, capacity {routing.capacity_factor:g}"
    layer = {
        kinds.get(e.kind, e.kind): True,
        "factorised gate": e.factorised_gate,
        "large router": e.large_router,
        f"K={e.top_k}": e.top_k != default_k,
        f"{routing.name.replace('_', ' ')} router": routing.name not in ("top_k", e.kind),
        "weights over all": routing.name == "top_k" and not routing.norm_topk_prob,
    }
    methods = {
        BALANCED_BY.get(routing.name, ""): routing.name in BALANCED_BY,
        "L_aux of each sequence" if b.aux_batch == "sequence" else "L_aux": b.aux_weight,
        "Ent_conf": b.entropy_weight,
        "z-loss": b.z_weight,
        "loss-free bias": b.bias_rate,
    }
    layer = ", ".join(name for name, holds in layer.items() if holds)
    methods = " + ".join(name for name, holds in methods.items() if holds)
    return layer, methods or "nothing"


def routed_sizes(r: Results):
    """Returns the sizes whose load is shown: the largest, if analysed, and the one with most arms.

    The first of them is the one for all other figures of routing.
    """
    sizes = [size for size in r.sizes if r.routed(size)]
    if not sizes:
        return []
    complete = [size for size in r.sizes if r.arms(size) == r.suite.arms_of(size)]
    largest = (complete or r.sizes)[-1]
    widest = max(sizes, key=lambda size: len(r.routed(size)))
    return list(dict.fromkeys([largest if largest in sizes else sizes[-1], widest]))


def sweeps(r: Results, costs: pd.DataFrame):
    """Costs of steps along the sweeps of a suite, measured or traced."""
    found = {"measured": [], "traced": []}
    for name, frame in costs.groupby("sweep", sort=False):
        if (frame["arm"] == r.suite.baseline).any():
            kind = "traced" if r.suite.throughput[name].is_topology else "measured"
            found[kind].append(_sweep(r, name, frame))
    return found


def _sweep(r, name, frame):
    """Returns the figure, its caption, and the rows of a sweep."""
    styles = figures.styles_of(r.suite.arms)
    sweep = r.suite.throughput[name]
    speed, other = frame["tokens_per_second"], frame["memory_bytes"]
    speed_name, other_name, unit = "tokens/s", "memory, MB", 1e6
    if sweep.is_topology:
        speed, other = speed / frame["x"], frame["received_bytes"]
        speed_name, other_name, unit = "tokens/s a chip, at most", "GB received a chip", 1e9
    values = pd.DataFrame(
        {"x": frame["x"], "arm": frame["arm"], "speed": speed, "other": other.astype(float) / unit}
    )
    table = values.pivot(index="x", columns="arm", values=["speed", "other"])
    speed, other = (table[name][frame["arm"].unique()] for name in ("speed", "other"))
    speed_ratio, other_ratio = (of.div(of[r.suite.baseline], axis=0) for of in (speed, other))
    rows, setting = [], SWEPT[sweep.setting]
    for x in speed.index[speed[r.suite.baseline].notna()]:
        row = {setting: f"{x:g}"}
        for quantity, of in ((speed_name, speed), (other_name, other)):
            row[f"{r.baseline_label}: {quantity}"] = number(of.loc[x, r.suite.baseline])
        for arm in speed.columns.drop(r.suite.baseline):
            ratios = [of.loc[x, arm] for of in (speed_ratio, other_ratio)]
            row[r.labels[arm]] = " / ".join(f"{ratio:.2f}" for ratio in ratios)
            if math.isnan(ratios[0]):
                row[r.labels[arm]] = "-"
        rows.append(row)
    last = (other_name, other) if sweep.is_topology else ("memory, ratio", other_ratio)
    panels = [
        (title, title == speed_name, {arm: of[arm].dropna() for arm in of})
        for title, of in ((speed_name, speed), ("speed, ratio", speed_ratio), last)
    ]
    figure = figures.against_setting(panels, r.labels, styles, setting)
    source = "bounds, not measured" if sweep.is_topology else "measured"
    model = _model_in_words(r, frame, sweep)
    caption = f"Against {setting} ({source}); ratios to {r.baseline_label}. {model}."
    return {"name": name, "figure": figure, "caption": caption, "rows": rows}


def _model_in_words(r, frame, sweep):
    """Describes the baseline's model and all ranks, without the setting that is swept."""
    of_arm = frame.groupby("arm", sort=False)["config"].first()
    config, setting = of_arm[r.suite.baseline], sweep.setting
    ranks = {other.experts.d_low for other in of_arm if other.experts.kind == "aoe"}
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


def at_equal_experts(r: Results, costs: pd.DataFrame):
    """Compares steps with those of the reference arm with as many experts a token.

    Rows exist only where a sweep over K has the model of a size.
    """
    rows = []
    for _, frame in costs[costs["setting"] == "experts.top_k"].groupby("sweep", sort=False):
        for size, arm in r.pairs:
            if not (frame["arm"] == arm).any() and r.suite.reference(arm) in r.arms(size):
                rows.append(_equal_row(r, size, arm, frame))
    return [row for row in rows if row]


def _equal_row(r, size, arm, frame):
    to, config = r.suite.reference(arm), r.configs[size, arm]
    experts = r.mean(size, arm, "experts_per_token").value
    if config.experts.kind != "dense" and not config.routing.choice(config.experts):
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
    """Returns the settings that determine the time of a step."""
    train = config.train
    shape = config.data.seq_len, train.batch_size, train.accumulate
    return config.model, config.experts, config.routing, shape


def tuning(r: Results, workdir: Path):
    """Shows the validation nll of each tried learning rate; None without a tuning."""
    if r.suite.tuning is None:
        return None
    rates, chosen, rows = r.suite.tuning.learning_rates, tuned_rates(r.suite, workdir), []
    for arm, nlls in tuning_nlls(r.suite, workdir).items():
        cells = {f"{rate:g}": _tuned_cell(nlls[rate]) for rate in rates}
        best = f"{chosen[arm]:g}" if chosen[arm] else "none"
        rows.append({"arm": r.labels[arm], **cells, "chosen": best})
    at_the_edge = bool({*chosen.values()} & {min(rates), max(rates)})
    return {"rows": rows, "at_the_edge": at_the_edge}


def _tuned_cell(nll):
    if nll is None:
        return "not finished"
    return f"{nll:.4f}" if math.isfinite(nll) else "diverged"


def fields_of_arms(r: Results):
    """Lists the settings of each arm at the first size that has it."""
    first = {}
    for (_, arm), config in r.configs.items():
        first.setdefault(arm, config)
    return [f"{r.labels[arm]}: {', '.join(_fields(config))}." for arm, config in first.items()]


def _fields(config):
    """Yields the fields of `experts`, `routing` and `balance` that have an effect."""
    for name, value in computed_fields(config).items():
        if name.startswith("experts.") and value is not False:
            yield f"{name.removeprefix('experts.').replace('d_wide', 'width')}={_plain(value)}"
    for name, value in config.to_dict()["routing"].items():
        yield f"routing.{name}={_plain(value)}"
    balance = dataclasses.asdict(config.balance)
    aux_losses = ("aux_weight", "entropy_weight", "z_weight")
    shown = [name for name in (*aux_losses, "bias_rate") if balance[name]]
    if any(name in aux_losses for name in shown):
        shown += ["aux_tokens", "aux_batch"]
    for name in shown:
        yield f"{name}={_plain(balance[name])}"


def _plain(value):
    return f"{value:g}" if isinstance(value, float) else str(value)

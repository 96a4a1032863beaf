"""The report of a suite: `report.md`, `report.html`, CSVs and figures, from the directories of its
runs alone.
"""

import dataclasses
import math
from pathlib import Path

from aoe_jax.compare import routing_sections, scaling_sections, sections, throughput_sections
from aoe_jax.compare.analysis import BUDGETS, Comparison
from aoe_jax.compare.document import (
    Code,
    Heading,
    Points,
    Table,
    Text,
    save_pictures,
    to_html,
    to_markdown,
)
from aoe_jax.compare.layout import beside, check_run, folder_of
from aoe_jax.compare.measuring import measured_file
from aoe_jax.compare.results import (
    curve_rows,
    difference_row,
    read_results,
    routing_rows,
    run_rows,
    write_csv,
)
from aoe_jax.compare.runs import PACKAGES, machines_of, tuned_rates, tuning_nlls
from aoe_jax.compare.suite import Suite
from aoe_jax.compare.throughput import cost_rows, read_costs, sweep_file
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.formats.configs import computed_fields
from aoe_jax.json_files import read_json


def write_report(suite: Suite, workdir: Path, command):
    """Writes the report of what there is.

    Args:
      suite: what was run.
      workdir: where; has a `machine.json`.
      command: the command line that made it, for the report.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: a run there is of another configuration.
    """
    runs = suite.runs(tuned_rates(suite, workdir))
    for run in runs:
        check_run(folder_of(workdir, run), run)
    comparison = Comparison(suite, read_results(runs, workdir))
    costs = {name: read_costs(suite, workdir, name) for name in suite.throughput}
    blocks = _blocks(comparison, costs, workdir, command)
    save_pictures(blocks, workdir / "figures")
    (workdir / "report.md").write_text(to_markdown(blocks, "figures"))
    page = workdir / "report.html"
    page.write_text(to_html(blocks))
    write_csv(workdir / "runs.csv", run_rows(comparison.results))
    write_csv(workdir / "curves.csv", curve_rows(comparison.results))
    write_csv(workdir / "routing.csv", routing_rows(comparison.results))
    write_csv(workdir / "throughput.csv", cost_rows(suite, costs))
    write_csv(
        workdir / "differences.csv",
        [
            difference_row(
                size,
                arm,
                comparison.reference(arm),
                budget,
                comparison.difference(size, arm, budget),
            )
            for size in comparison.sizes()
            for arm in comparison.series(size)
            if arm != suite.baseline
            for budget in BUDGETS
        ],
    )
    return page


def _blocks(c, costs, workdir, command):
    styles = sections.styles_of(c)
    blocks = _head(c, workdir)
    blocks += _failed(c, workdir)
    if c.sizes():
        blocks += sections.losses(c, styles) + sections.budgets(c) + sections.curves(c, styles)
        blocks += (
            scaling_sections.scaling(c, styles)
            + scaling_sections.isoflop(c, styles)
            + sections.cost(c)
        )
        blocks += (
            routing_sections.balance(c)
            + routing_sections.load(c)
            + routing_sections.health(c, styles)
        )
    blocks += throughput_sections.throughput(c, costs, styles)
    if c.suite.sizes:
        blocks += sections.matched(c)
    return blocks + _tuning(c, workdir) + _settings(c, command)


def _head(c, workdir):
    machines, count = machines_of(workdir), len(c.results)
    states = {
        state: sum(r.state == state for r in c.results)
        for state in ("finished", "diverged", "failed", "unfinished")
    }
    hours = (
        sum(
            r.seconds_per_step * r.run.config.train.steps
            for r in c.results
            if r.state == "finished"
        )
        / 3600
    )
    others = "".join(
        f", {states[state]} {state}"
        for state in ("diverged", "failed", "unfinished")
        if states[state]
    )
    points = [f"Machine: {_in_words(machine)}." for machine in machines]
    if len(machines) > 1:
        points.append(
            "These took part one after another; which of them did what isn't known, so that seconds are of any."
        )
    if count:
        points = [
            f"Runs: {states['finished']} of {count} finished{others}.",
            f"Training steps of the finished runs, at the seconds a step that are reported below: {hours:.2f} hours on "
            f"{'a core' if machines[-1]['backend'] == 'cpu' else 'all devices'}.",
            *points,
        ]
    points += _not_causal(c)
    return [Heading(1, f"Comparison: {c.suite.name}"), Points(points)]


def _not_causal(c):
    """A line for each arm whose losses know of later tokens."""
    points = []
    for arm, config in {r.run.arm: r.run.config for r in c.results}.items():
        kind, method = LAYERS[config.experts.kind], SELECTIONS[config.experts.selection]
        reason, until = kind.not_causal_because(config.experts), 0
        if kind.selects and method.not_causal_because:
            reason, until = (
                reason or method.not_causal_because,
                method.not_causal_until(config.method_settings),
            )
        if until:
            points.append(
                f"{c.labels[arm]}: not causal before step {until}: {reason}. Validation is causal."
            )
        elif reason:
            leaks = "what it knows of them is in its loss"
            if kind.selects and not method.causal:
                leaks = "its losses compare with no others here"
            points.append(f"{c.labels[arm]}: not causal: {reason}; {leaks}.")
    return points


def _in_words(machine):
    where = (
        f"{machine['cores']} cores"
        if machine["backend"] == "cpu"
        else f"{machine['devices']} devices"
    )
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    commit = f"; aoe_jax at {machine['commit']}" if machine.get("commit") else ""
    return f"{machine['device']}, {where}; {versions}{commit}"


def _failed(c, workdir):
    rows = [
        [
            f"{r.run.size}: {c.labels[r.run.arm]}, seed {r.run.seed}",
            r.last_line[:200]
            if r.state == "failed"
            else "diverged: its validation nll isn't finite",
            f"runs/{r.run.name}.log",
        ]
        for r in c.results
        if r.state in ("failed", "diverged")
    ]
    measured = {
        f"{size}: routing and step times": measured_file(workdir, size) for size in c.suite.sizes
    }
    measured |= {f"throughput {name}": sweep_file(workdir, name) for name in c.suite.throughput}
    for name, file in measured.items():
        outcome = beside(file, ".outcome.json")
        ended = read_json(outcome) if outcome.exists() else {"status": 0}
        if ended["status"]:
            rows.append(
                [name, ended["last_line"][:200], str(beside(file, ".log").relative_to(workdir))]
            )
    if not rows:
        return []
    return [
        Heading(2, "Failed runs"),
        Text(
            "These ended before they were done, or diverged; runs among them count nowhere below."
        ),
        Table(["run", "its last line", "log"], rows),
    ]


def _in_cell(nll):
    if nll is None:
        return "not finished"
    return f"{nll:.4f}" if math.isfinite(nll) else "diverged"


def _tuning(c, workdir):
    if c.suite.tuning is None:
        return []
    rates, chosen, rows = c.suite.tuning.learning_rates, tuned_rates(c.suite, workdir), []
    for arm, nlls in tuning_nlls(c.suite, workdir).items():
        cells = [_in_cell(nlls[rate]) for rate in rates]
        rows.append([c.labels[arm], *cells, f"{chosen[arm]:g}" if chosen[arm] else "none"])
    text = (
        f"Validation nll after {c.suite.tuning.steps} steps at {c.suite.tuning_size}, one seed that counts nowhere else; "
        "the best learning rate of an arm is that of all its sizes, but for the factor that the suite gives a size. No "
        "interval in this report has the chance of this choice in it."
    )
    if set(chosen.values()) & {min(rates), max(rates)}:
        text += (
            " Where that is the lowest or the highest that was tried, a better one may lie beyond."
        )
    return [
        Heading(2, "Learning rates"),
        Text(text),
        Table(["arm", *(f"{rate:g}" for rate in rates), "chosen"], rows),
    ]


def _arms(c):
    """A line an arm, of its first size: the fields of `experts`, of its method and of `balance`
    that have a say.
    """
    first = {}
    for r in c.results:
        first.setdefault(r.run.arm, r.run.config)
    return [
        f"{c.labels[arm]}: {', '.join(_fields(first[arm]))}."
        for arm in c.suite.arms
        if arm in first
    ]


def _fields(config):
    for name, value in computed_fields(config).items():
        if name.startswith("experts.") and value is not False:
            yield f"{name.removeprefix('experts.').replace('d_wide', 'width')}={_plain(value)}"
    if config.method_name:
        for name, value in dataclasses.asdict(config.method_settings).items():
            yield f"{config.method_name}.{name}={_plain(value)}"
    balance, losses = (
        dataclasses.asdict(config.balance),
        ("aux_weight", "entropy_weight", "z_weight"),
    )
    shown = [name for name in (*losses, "bias_rate", "coupling_weight") if balance[name]]
    if any(name in losses for name in shown):
        shown += ["aux_tokens", "aux_batch"]
    for name in shown:
        yield f"{name}={_plain(balance[name])}"


def _plain(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(c, command):
    rows = []
    for size in c.suite.sizes:
        config = next(
            r.run.config for r in c.results if (r.run.size, r.run.arm) == (size, c.suite.baseline)
        )
        m, e, t, d = config.model, config.experts, config.train, config.data
        rows.append(
            [
                size,
                f"{m.n_layers} x {m.d_model}, {m.n_heads} heads",
                f"{e.top_k} of {e.n_experts}",
                f"{m.vocab_size}",
                f"{t.batch_size} x {d.seq_len}",
                f"{t.steps}",
                f"{t.warmup_steps}",
                m.dtype,
                d.name,
                f"{c.suite.sizes[size].seeds}",
            ]
        )
    head = "size|layers x width|experts|vocabulary|batch|steps|warm-up|computed in|corpus|seeds"
    recipe = [
        Table(head.split("|"), rows),
        Text(
            "AdamW, linear warm-up and cosine for all arms alike"
            + (
                "."
                if c.suite.tuning
                else ", and one peak learning rate a size, which wasn't tuned for each."
            )
            + " The configuration of each run is in "
            "`runs/SIZE/ARM/seed_N/config.json`; numbers are in `runs.csv`, `curves.csv`, `routing.csv` and "
            "`differences.csv`."
        ),
    ]
    if rows:
        recipe += [
            Text("What arms are, at the first size that has them:"),
            Points(_arms(c)),
        ]
    files = "Figures are in `figures/`" + ", numbers of throughput in `throughput.csv`" * bool(
        c.suite.throughput
    )
    return [
        Heading(2, "Settings"),
        *(recipe if rows else []),
        Text(f"{files}. To make it again:"),
        Code(command),
    ]

"""A small suite from end to end: cut off and begun again, an arm that fails, and its report."""

import csv
import math
import re
import shutil
import signal
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from aoe_jax.compare.analysis import Comparison
from aoe_jax.compare.arms import aoe, other_selection
from aoe_jax.compare.document import to_markdown
from aoe_jax.compare.layout import check_run, folder_of, tuning_folder
from aoe_jax.compare.measuring import step_seconds
from aoe_jax.compare.report import write_report
from aoe_jax.compare.results import Curve, read_results
from aoe_jax.compare.runs import tuned_rates, tuning_nlls
from aoe_jax.compare.scaling_sections import scaling
from aoe_jax.compare.sections import losses, styles_of
from aoe_jax.compare.suite import Size, load_suite
from aoe_jax.config import Config
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json
from tests.compare.suites import write_suite
from tests.hasty import xla_flags
from tests.runs import finish, scratch, shared, start


def command(folder, *more):
    return [
        "-m",
        "aoe_jax.compare",
        f"--suite={folder / 'suite.py'}",
        f"--workdir={folder / 'work'}",
        *more,
    ]


def checkpoints(folder):
    return [path for path in folder.glob("work/runs/*/*/*/checkpoints/*") if path.name.isdecimal()]


@shared
def ended():
    """`(folder, what was interrupted, what went on)`: each `(exit status, stderr)`."""
    folder = scratch("compare")
    write_suite(folder / "suite.py")
    process = start(command(folder), XLA_FLAGS=xla_flags())
    deadline = time.monotonic() + 200
    while not checkpoints(folder):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    first = status, stderr
    status, _, stderr = finish(start(command(folder), XLA_FLAGS=xla_flags()))
    return folder, first, (status, stderr)


def rows(name):
    with (ended()[0] / "work" / name).open() as file:
        return list(csv.DictReader(file))


def test_interrupted_it_stops_its_runs_and_says_how_to_go_on():
    folder, (status, stderr), _ = ended()
    assert status == 130
    assert (
        stderr.strip().splitlines()[-1]
        == "interrupted: what is done is saved; the same command goes on from there"
    )
    logs = [path.read_text() for path in folder.glob("work/runs/*/*/*.log")]
    assert any("the same command goes on" in log and log.count("$ ") > 1 for log in logs)


def test_begun_again_it_trains_the_rest_and_shows_what_failed():
    folder, _, (status, stderr) = ended()
    assert status == 0, stderr
    assert (
        "a/broken/seed_0 failed with status 2: error: config.experts.gate='sparsemixer'" in stderr
    )
    states = {(row["size"], row["arm"], row["seed"]): row["state"] for row in rows("runs.csv")}
    assert [states.pop(("a", "broken", seed)) for seed in ("0", "1")] == ["failed", "failed"]
    assert set(states.values()) == {"finished"} and len(states) == 4
    markdown = (folder / "work/report.md").read_text()
    assert "4 of 6 finished, 2 failed" in markdown
    failed = markdown[markdown.index("## Failed runs") :]
    assert "routing and step times" not in markdown
    assert (
        "a: broken, seed 1" in failed
        and "runs/a/broken/seed_1.log" in failed
        and "sparsemixer" in failed
    )


def test_arms_of_a_seed_see_the_same_data_and_seeds_other_data():
    folder = ended()[0] / "work/runs/a"
    first = {}
    for path in folder.glob("[am]o*/seed_?"):
        config = Config.from_config_dict(read_json(path / "config.json"))
        corpus, train = open_corpus(config.data, config.model.vocab_size), config.train
        batches = train_batches(
            corpus.train, corpus.weights, config.data.seq_len, train.batch_size, train.seed
        )
        first[path.parent.name, path.name] = next(iter(batches))["inputs"]
    assert len(first) == 4
    for seed in ("seed_0", "seed_1"):
        np.testing.assert_array_equal(first["moe", seed], first["aoe", seed])
    assert (first["moe", "seed_0"] != first["moe", "seed_1"]).any()


def test_finished_it_does_nothing_again():
    """But for the arm that has failed."""
    folder = ended()[0]
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("work/runs/*/[am]o*/*/*")
        if path.is_file()
    }
    assert any(path.name == "metrics.jsonl" for path in before)
    status, _, stderr = finish(start(command(folder)))
    assert status == 0, stderr
    assert "2 of 6 runs to do" in stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    runs = load_suite(folder / "suite.py").runs()
    assert set(step_seconds(folder / "work", runs, "a")) == {"moe", "aoe"}


def test_a_run_whose_validation_diverged_counts_nowhere(tmp_path):
    shutil.copytree(ended()[0] / "work", tmp_path / "work")
    summary = tmp_path / "work/runs/a/aoe/seed_1/summary.json"
    found = read_json(summary)
    found["metrics"]["validation_nll"] = None
    write_json(summary, found)
    suite = load_suite(ended()[0] / "suite.py")
    comparison = Comparison(suite, read_results(suite.runs(), tmp_path / "work"))
    assert [r.state for r in comparison.results if r.run.arm == "aoe"] == ["finished", "diverged"]
    assert list(comparison.nlls("a", "aoe")) == [0]
    write_report(suite, tmp_path / "work", "command")
    assert "a: AoE r=d/4, L_aux, seed 1 | diverged" in (tmp_path / "work/report.md").read_text()


def test_a_workdir_of_another_configuration_is_refused():
    folder = ended()[0]
    status, _, stderr = finish(start(command(folder, "--set=train.weight_decay=0.3")))
    assert (
        status == 2
        and "holds another configuration: train.weight_decay is 0.1 there, 0.3 here" in stderr
    )


def test_tables_hold_the_numbers_of_the_runs():
    folder = ended()[0] / "work"
    nll = {
        (path.parts[-3], path.parts[-2]): read_json(path)["metrics"]["validation_nll"]
        for path in folder.glob("runs/a/*/seed_?/summary.json")
    }
    mean = sum(nll["aoe", f"seed_{seed}"] - nll["moe", f"seed_{seed}"] for seed in (0, 1)) / 2
    row = next(row for row in rows("differences.csv") if row["at_equal"] == "end")
    assert (row["arm"], row["n"]) == ("aoe", "2") and float(row["value"]) == pytest.approx(mean)
    side = "below" if mean < 0 else "above"
    sentence = f"AoE r=d/4, L_aux is {abs(mean):.4f} ± "
    markdown = (folder / "report.md").read_text()
    assert sentence in markdown and f"nats {side} MoE, L_aux at a (95% interval" in markdown
    curve = [
        row
        for row in rows("curves.csv")
        if (row["arm"], row["seed"], row["split"]) == ("aoe", "1", "validation")
    ]
    assert [row["step"] for row in curve] == ["3", "6"]
    assert {row["step"] for row in rows("routing.csv")} == {"2", "4", "6"}


def test_routing_is_looked_at():
    routing = read_json(ended()[0] / "work/runs/a/aoe/seed_0/routing.json")
    last = routing["checkpoints"][-1]
    assert last["step"] == 6 and last["overlap_with_final"] == [1.0, 1.0]
    for layer, load in enumerate(last["load"]):
        assert sum(load) == pytest.approx(2) and len(load) == 4
        together = routing["coactivation"][layer]
        assert [together[i][i] for i in range(4)] == pytest.approx(load)
        assert sum(map(sum, together)) == pytest.approx(
            4
        )  # pairs of 2 chosen, in order, themselves included
    oracle = routing["oracle"]
    for chosen, best, any_ in zip(
        *(oracle[f"distance_{of}"] for of in ("chosen", "oracle", "any")), strict=True
    ):
        assert best <= chosen + 1e-6 and best < any_


def test_the_page_needs_nothing_else():
    folder = ended()[0] / "work"
    page = (folder / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe|object)\b", page)
    assert (
        not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:)", page)
        and "url(http" not in page
        and "@import" not in page
    )
    for words in (
        "Final validation loss",
        "At equal FLOPs",
        "Balance of load",
        "Routing health",
        "Failed runs",
    ):
        assert f">{words}" in page, words
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used <= set(ids) and not [name for name in ids if re.search(r"_\d+$", name)]
    body = page[page.index("<body>") : page.index("</html>")]
    ElementTree.fromstring(body)  # well-formed


def test_scaling_is_fitted_over_sizes():
    folder = ended()[0]
    suite = load_suite(folder / "suite.py")
    results = read_results(suite.runs(), folder / "work")
    # The same results once more as those of a model of twice the layers, at 0.9 times the loss.
    deeper = {"model": {"n_layers": 4}}
    sizes = suite.sizes | {"b": Size(deeper, seeds=2)}
    larger = [
        replace(
            r,
            run=replace(
                r.run,
                size="b",
                config=replace(r.run.config, model=replace(r.run.config.model, n_layers=4)),
            ),
        )
        for r in results
    ]
    larger = [replace(r, nll=0.9 * r.nll) for r in larger]
    comparison = Comparison(replace(suite, sizes=sizes), [*results, *larger])
    fits = comparison.fits("active_non_embedding")
    assert set(fits) == {"moe", "aoe"}
    xs = list(comparison.points("active_non_embedding")["aoe"])
    assert fits["aoe"].exponent == pytest.approx(-math.log(0.9) / math.log(xs[1] / xs[0]))
    text = to_markdown(scaling(comparison, styles_of(comparison)), "figures")
    assert "scaling_flops.png" in text and f"{fits['aoe'].exponent:.4f} [" in text


def test_figures_lie_beside_the_report():
    folder = ended()[0] / "work"
    named = re.findall(r"\]\((figures/[^)]+\.png)\)", (folder / "report.md").read_text())
    assert len(named) > 10
    for name in named:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
        ElementTree.parse((folder / name).with_suffix(".svg"))


TUNING = "tuning=Tuning((1e-3, 3e-3), steps=3),"


def test_the_best_learning_rate_of_an_arm_is_that_of_its_runs(tmp_path):
    """Found anew from the runs of the tuning, so that one that has failed and is tried again
    counts.
    """
    suite = load_suite(write_suite(tmp_path / "suite.py", TUNING))
    assert tuned_rates(suite, tmp_path) == {"moe": None, "aoe": None, "broken": None}
    nlls = {("moe", 1e-3): 6.0, ("moe", 3e-3): 5.0, ("aoe", 1e-3): 4.0, ("aoe", 3e-3): 5.0}

    def finish_run(key, nll, again=False):
        run = suite.tuning_runs()[key]
        folder = tuning_folder(tmp_path, run)
        folder.mkdir(parents=True, exist_ok=again)
        write_json(folder / "config.json", run.config.to_dict())
        write_json(folder / "summary.json", {"metrics": {"step": 3, "validation_nll": nll}})

    for key, nll in nlls.items():
        finish_run(key, nll)
    rates = tuned_rates(suite, tmp_path)
    runs = {run.name: run.config.train for run in suite.runs(rates)}
    assert runs["a/moe/seed_0"].learning_rate == 3e-3 and runs["a/aoe/seed_0"].learning_rate == 1e-3
    assert runs["a/broken/seed_0"].learning_rate == 3e-3  # none of its runs has finished: as it is
    finish_run(("broken", 3e-3), None)
    assert tuning_nlls(suite, tmp_path)["broken"] == {1e-3: None, 3e-3: math.inf}  # it has diverged
    assert tuned_rates(suite, tmp_path)["broken"] is None
    finish_run(("broken", 1e-3), 7.0)
    assert tuned_rates(suite, tmp_path)["broken"] == 1e-3
    run = next(run for run in suite.runs(rates) if run.name == "a/moe/seed_0")
    folder_of(tmp_path, run).mkdir(parents=True)
    write_json(folder_of(tmp_path, run) / "config.json", run.config.to_dict())
    finish_run(("moe", 3e-3), 9.0, again=True)
    assert tuned_rates(suite, tmp_path)["moe"] == 3e-3  # as its runs have begun
    longer = load_suite(write_suite(tmp_path / "other.py", TUNING, train__clip_norm=0.5))
    with pytest.raises(
        UserError, match=r"another configuration: train\.clip_norm is 1\.0 there, 0\.5 here"
    ):
        tuned_rates(longer, tmp_path)


def test_losses_at_equal_flops_and_seconds():
    """By hand, of the curves of the runs."""
    folder = ended()[0]
    suite = load_suite(folder / "suite.py")
    results = [r for r in read_results(suite.runs(), folder / "work") if r.state == "finished"]
    # As if a step of AoE took twice the seconds of one of the MoE, whose losses were 5 at step 3
    # and 4 at step 6.
    seconds = {"moe": 1.0, "aoe": 2.0}
    curve = Curve(np.array([3, 6]), np.array([5.0, 4.0]))
    results = [
        replace(r, seconds_per_step=seconds[r.run.arm], validation=curve, nll=4.0) for r in results
    ]
    comparison = Comparison(suite, results)
    both = ("aoe", "moe")
    assert comparison.budget("a", both, "seconds") == 6
    assert comparison.nlls("a", "moe", "seconds", 6) == {0: 4.0, 1: 4.0}
    assert comparison.difference("a", "aoe", "seconds").value == pytest.approx(
        1.0
    )  # it is at step 3 by then
    flops = {r.run.arm: r.flops_per_step for r in results}
    least = min(flops, key=flops.get)
    budget = comparison.budget("a", both, "flops")
    assert budget == pytest.approx(6 * flops[least])
    other = max(flops, key=flops.get)
    at = math.log(2 * flops[least] / flops[other]) / math.log(2)  # between steps 3 and 6
    assert comparison.nlls("a", other, "flops", budget)[0] == pytest.approx(5 - at)
    of_selection = {
        name: Comparison(
            replace(suite, arms=suite.arms | {"aoe": other_selection(aoe(4, "aux"), name)}), results
        )
        for name in ("top_p", "expert_choice")
    }
    by_top_p, by_expert_choice = of_selection.values()
    assert (
        by_top_p.difference("a", "aoe").n == 2 and by_top_p.difference("a", "aoe", "flops").n == 0
    )
    assert by_expert_choice.difference("a", "aoe").n == 0  # whose losses know of later tokens


def test_an_arm_may_be_held_against_another_than_the_baseline():
    folder = ended()[0]
    suite = load_suite(folder / "suite.py")
    results = [r for r in read_results(suite.runs(), folder / "work") if r.state == "finished"]
    twins = [
        replace(r, run=replace(r.run, arm="twin"), nll=r.nll + 1)
        for r in results
        if r.run.arm == "aoe"
    ]
    arms = suite.arms | {"twin": replace(suite.arms["aoe"], label="twin", reference="aoe")}
    comparison = Comparison(replace(suite, arms=arms), [*results, *twins])
    assert comparison.difference("a", "twin").value == pytest.approx(1)
    text = to_markdown(losses(comparison, styles_of(comparison)), "figures")
    assert "nats above AoE r=d/4, L_aux at a" in text and "] to AoE r=d/4, L_aux |" in text
    with pytest.raises(UserError, match=r"arms\['twin'\]\.reference='nobody'"):
        replace(suite, arms=suite.arms | {"twin": replace(arms["twin"], reference="nobody")})


def test_a_run_of_other_length_is_refused(tmp_path):
    """Whose learning rate has come down at another step."""
    (run, *_) = load_suite(write_suite(tmp_path / "suite.py")).runs()
    longer = replace(run, config=replace(run.config, train=replace(run.config.train, steps=9)))
    write_json(tmp_path / "config.json", run.config.to_dict())
    check_run(tmp_path, run)
    with pytest.raises(UserError, match=r"train\.steps is 6 there, 9 here"):
        check_run(tmp_path, longer)


def test_a_report_of_other_settings_is_refused():
    folder = ended()[0]
    status, _, stderr = finish(start(command(folder, "--report", "--set=train.weight_decay=0.3")))
    assert (
        status == 2
        and "holds another configuration: train.weight_decay is 0.1 there, 0.3 here" in stderr
    )

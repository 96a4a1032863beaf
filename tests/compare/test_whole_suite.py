"""A small suite from end to end: interrupted and continued, an arm that fails, and its report."""

import re
import shutil
import signal
import subprocess
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from aoe_jax.compare.jobs import Machine
from aoe_jax.compare.measure import configs_by_point, measured_file, read_point
from aoe_jax.compare.report import write_report
from aoe_jax.compare.suite import load_suite
from aoe_jax.compare.train_runs import train_suite
from aoe_jax.config.run import Config
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.storage.files import read_json, write_json
from tests.compare.suites import write_suite
from tests.hasty import xla_flags
from tests.runs import ROOT, finish, scratch, shared, start, wait_for

pytestmark = pytest.mark.slow  # they share two runs of the command
SWEEP = 'throughput={"tokens": Sweep("train.batch_size", (2, 4), {}, arms=("moe", "aoe"))},'
COSTS = {arm: {"seconds": 1.0, "memory_bytes": 1e6} for arm in ("moe", "aoe")}
EARLIER = {"backend": "cpu", "device": "abacus", "cores": 1, "devices": 1, "python": "2"}
PACKAGES = {"jax": "0", "numpy": "1", "jaxlib": "0", "flax": "0", "optax": "0"}


def command(folder):
    suite, workdir = f"--suite={folder / 'suite.py'}", f"--workdir={folder / 'work'}"
    return start(["-m", "aoe_jax.compare", suite, workdir], XLA_FLAGS=xla_flags())


@shared
def ended():
    """`(folder, what was interrupted, what went on)`: each `(exit status, stderr)`.

    There are the machine of an earlier version of the command, and a point of the sweep, already.
    """
    folder = scratch("compare")
    work = folder / "work"
    suite = load_suite(write_suite(folder / "suite.py", SWEEP))
    measured_file(work, "tokens_2").parent.mkdir(parents=True)
    write_json(work / "machine.json", {"machines": [EARLIER | PACKAGES]})
    configs = {arm: config.to_dict() for arm, config in suite.swept("tokens")[2].items()}
    write_json(measured_file(work, "tokens_2"), {"configs": configs, "costs": COSTS})
    process, saved = command(folder), "runs/*/*/*/checkpoints/*"
    wait_for(process, lambda: any(path.name.isdecimal() for path in work.glob(saved)))
    process.send_signal(signal.SIGINT)
    first, _, stderr_of_first = finish(process)
    second, _, stderr = finish(command(folder))
    return folder, (first, stderr_of_first), (second, stderr)


def rows(name):
    frame = pd.read_csv(ended()[0] / "work" / name, dtype=str)
    return frame.to_dict("records")


def test_interrupted_it_stops_its_runs_and_continued_it_trains_the_rest():
    folder, (status, stderr), _ = ended()
    assert status == 130
    words = "interrupted: the work so far is saved; the same command goes on from there"
    assert stderr.strip().splitlines()[-1] == words
    logs = [path.read_text() for path in folder.glob("work/runs/*/*/*.log")]
    assert any("the same command goes on" in log and log.count("$ ") > 1 for log in logs)
    _, _, (status, stderr) = ended()
    assert status == 0, stderr
    reason = "a/broken/seed_0 failed with status 2: error: attention backend='cudnn' does not run"
    assert reason in stderr
    states = {(row["arm"], row["seed"]): row["state"] for row in rows("runs.csv")}
    assert states == {
        (arm, seed): "failed" if arm == "broken" else "finished"
        for arm in ("moe", "aoe", "broken")
        for seed in ("0", "1")
    }
    markdown = (folder / "work/report.md").read_text()
    assert "Runs: 6, 4 finished, 2 failed." in markdown
    for form, row in (("md", "| MoE, L_aux"), ("tex", "\nMoE, L\\_aux & ")):
        assert row in (folder / f"work/table.{form}").read_text()
    failed = markdown[markdown.index("## Failed runs") :]
    assert "a: broken, seed 1" in failed and "runs/a/broken/seed_1.log" in failed


def test_arms_of_a_seed_see_the_same_data_and_seeds_other_data():
    folder = ended()[0] / "work/runs/a"
    first = {}
    for path in folder.glob("[am]o*/seed_?"):
        config = Config.from_stored(read_json(path / "config.json"))
        corpus, train = open_corpus(config.data, config.model.vocab_size), config.train
        batches = train_batches(
            corpus.train, corpus.weights, config.data.seq_len, train.batch_size, train.seed
        )
        first[path.parent.name, path.name] = next(iter(batches))["inputs"]
    assert len(first) == 4
    for seed in ("seed_0", "seed_1"):
        np.testing.assert_array_equal(first["moe", seed], first["aoe", seed])
    assert (first["moe", "seed_0"] != first["moe", "seed_1"]).any()


def test_finished_it_only_repeats_the_failed_arm():
    folder = ended()[0]
    files = [path for path in folder.glob("work/runs/*/[am]o*/*/*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert any(path.name == "metrics.jsonl" for path in files)
    status, _, stderr = finish(command(folder))
    assert status == 0 and "2 of 6 runs to do" in stderr, stderr
    assert before == {path: path.stat().st_mtime_ns for path in files}
    configs = configs_by_point(load_suite(folder / "suite.py"), folder / "work")["a"]
    assert set(read_point(folder / "work", "a", configs)) == {"moe", "aoe"}


def test_steps_of_a_seed_with_a_checkpoint_are_timed(tmp_path):
    work = shutil.copytree(ended()[0] / "work", tmp_path / "work")
    shutil.rmtree(work / "runs/a/moe/seed_0/checkpoints")
    configs = configs_by_point(load_suite(ended()[0] / "suite.py"), work)["a"]
    assert [configs[arm].train.seed for arm in ("moe", "aoe")] == [1, 0]


def test_a_workdir_of_another_configuration_is_refused():
    work = ended()[0] / "work"
    other = load_suite(ended()[0] / "suite.py", ["train.weight_decay=0.3"])
    words = r"holds another configuration: train\.weight_decay is 0\.1 there, 0\.3 here"
    with pytest.raises(UserError, match=words):
        train_suite(other, work, Machine("cpu", [None], {}))
    with pytest.raises(UserError, match=words):
        write_report(other, work, "command")


def test_tables_and_page_have_the_numbers_of_the_runs():
    folder = ended()[0] / "work"
    nll = {
        (path.parts[-3], path.parts[-2]): read_json(path)["metrics"]["validation_nll"]
        for path in folder.glob("runs/a/*/seed_?/summary.json")
    }
    mean = sum(nll["aoe", f"seed_{seed}"] - nll["moe", f"seed_{seed}"] for seed in (0, 1)) / 2
    row = next(row for row in rows("differences.csv") if row["at_equal"] == "end")
    assert (row["arm"], row["n"]) == ("aoe", "2") and float(row["value"]) == pytest.approx(mean)
    assert f"| {mean:+.4f} ± " in (folder / "report.md").read_text()
    steps = {(row["arm"], row["seed"], row["split"], row["step"]) for row in rows("curves.csv")}
    of_run = {step for *run, step in steps if run == ["aoe", "1", "validation"]}
    assert of_run == {"3", "6"}
    assert {row["step"] for row in rows("routing.csv")} == {"2", "4", "6"}
    routing = read_json(folder / "runs/a/aoe/seed_0/routing.json")
    last = routing["checkpoints"][-1]
    assert last["step"] == 6 and last["overlap_with_final"] == [1.0, 1.0]
    assert [len(load) for load in last["load"]] == [4, 4]
    np.testing.assert_allclose(np.sum(last["load"], axis=1), 2)
    page = (folder / "report.html").read_text()  # it is one file
    assert not re.search(r"<(script|link|iframe|object)\b", page) and "url(" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:)", page)
    for words in ("Final validation loss", "At equal FLOPs", "Routing health", "Failed runs"):
        assert f">{words}" in page, words
    named = re.findall(r"\]\((figures/[^)]+\.png)\)", (folder / "report.md").read_text())
    assert len(named) > 10 and page.count('src="data:image/svg+xml;base64,') == len(named)
    for name in named:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
        ElementTree.parse((folder / name).with_suffix(".svg"))


def test_the_sweep_measures_missing_points():
    """One point was there already, and the machine of an earlier version of the command."""
    work = ended()[0] / "work"
    first, second = (read_json(measured_file(work, f"tokens_{n}"))["costs"] for n in (2, 4))
    assert first == COSTS and 0 < second["aoe"]["seconds"] < 1
    earlier, machine = read_json(work / "machine.json")["machines"]
    assert earlier["device"] == "abacus"
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    assert head.startswith(machine["commit"].removesuffix("-dirty"))
    of = {(row["arm"], row["x"]): row for row in rows("throughput.csv")}
    assert list(of) == [("moe", "2"), ("aoe", "2"), ("moe", "4"), ("aoe", "4")]
    moe, aoe = of["moe", "4"], of["aoe", "4"]
    ratio = float(moe["seconds_per_step"]) / float(aoe["seconds_per_step"])
    memory = float(aoe["memory_bytes"]) / float(moe["memory_bytes"])
    markdown = (work / "report.md").read_text()
    for words in (
        f"Machine: commit {machine['commit']}, backend cpu, device ",
        "Machine: backend cpu, device abacus, cores 1, devices 1, python 2, jax 0",
        "took part one after another",
        "## Throughput against settings",
        f"{ratio:.2f} / {memory:.2f} |",
        "figures/throughput_tokens.png",
        "\npython -m aoe_jax.compare --suite=",
    ):
        assert words in markdown


def test_a_suite_may_train_nothing(tmp_path):
    suite = load_suite(write_suite(tmp_path / "suite.py", f"sizes={{}}, {SWEEP}"))
    work = shutil.copytree(ended()[0] / "work/measured", tmp_path / "work/measured").parent
    write_json(work / "machine.json", {"machines": [EARLIER | PACKAGES]})
    write_report(suite, work, "command")
    markdown = (work / "report.md").read_text()
    assert "## Throughput against settings" in markdown and "Failed" not in markdown
    assert "What is matched" not in markdown and "Final" not in markdown

"""Tasks of lm-eval through the adapter: exact results of a model with known answers."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation import tasks
from tests.evaluation.public_tasks import EVALUATED, KNOWN, known_model, write_examples
from tests.in_process import call
from tests.runs import finished_run, run, scratch


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch, ragged):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tasks, "_BOOTSTRAPS", 20)
    return write_examples(tmp_path / "data")


def test_the_ten_tasks_are_exactly_right(data):
    loaded = tasks.load_tasks(list(KNOWN), data=data)
    report = tasks.score_model(known_model(), loaded)
    assert list(report) == list(KNOWN)
    n_examples = {file.partition("/")[0]: len(rows) for file, rows in EVALUATED.items()}
    for name, known in KNOWN.items():
        entry = report[name]
        values = {metric: figure["value"] for metric, figure in entry["metrics"].items()}
        assert values == pytest.approx(known)
        assert entry["examples"] == n_examples[name]
        assert entry["fewshot"] == (3 if name in ("mnli", "qnli", "sst2", "mrpc", "qqp") else 0)
        stderr = math.sqrt(known["acc"] * (1 - known["acc"]) / (n_examples[name] - 1))
        assert entry["metrics"]["acc"]["stderr"] == pytest.approx(stderr)
    assert 0 < report["mrpc"]["metrics"]["f1"]["stderr"] < 1
    of_eight = [known["acc"] for name, known in KNOWN.items() if name not in ("mrpc", "qqp")]
    last = tasks.tasks_table(report).splitlines()[-1].split()
    assert last[:5] == ["the", "paper's", "AVG", "acc", f"{np.mean(of_eight):.4f}"]
    report.pop("sst2")
    assert "AVG" not in tasks.tasks_table(report)


def test_prompts_have_shots_from_the_training_split(data):
    (prompt, *_) = tasks.prompts(tasks.load_tasks(["sst2"], data=data))
    assert prompt.count("Question: Is this sentence positive or negative?\nAnswer:") == 4
    assert prompt.endswith("negative?\nAnswer:")
    (prompt, *_) = tasks.prompts(tasks.load_tasks(["sst2"], fewshot=0, data=data))
    assert prompt == "s 0 .\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert len(tasks.prompts(tasks.load_tasks(["sst2"], data=data), limit=2)) == 2


def test_missing_and_bad_data(data):
    def is_refused(name, words, **settings):
        with pytest.raises(UserError, match=words):
            tasks.load_tasks([name], data=data, **settings)

    few = r"--fewshot={}: .*sst2/train\.jsonl must hold more than {} examples"
    is_refused("sst2", few.format(9, 9), fewshot=9)
    (data / "sst2/train.jsonl").unlink()
    tasks.load_tasks(["sst2"], fewshot=0, data=data)
    is_refused("sst2", few.format(3, 3))
    (data / "mnli/validation_matched.jsonl").unlink()
    is_refused("mnli", r"--tasks-data=.*mnli/validation_matched\.jsonl is missing")
    (data / "piqa/validation.jsonl").write_text('{"goal": "g", "sol1": "a"}\n')
    is_refused("piqa", r"--tasks=piqa: .*cannot be used \(ValueError: ")
    (data / "qqp/validation.jsonl").write_text("{oh\n")
    is_refused("qqp", r"--tasks=qqp: .*cannot be used \(ArrowInvalid: ")


WRONG = r"--tasks-data=.*: line 2 of "


@pytest.mark.parametrize(
    ("task", "field", "label", "words"),
    [
        ("sst2", "label", None, r"the evaluated examples of sst2: .* of its choices \(None\)"),
        ("sst2", "label", 7, r"the evaluated examples of sst2: its label names none .* \(7\)"),
        ("winogrande", "answer", "x", ".* examples of winogrande: .* none of its choices"),
        ("social_iqa", "label", "x", ".* examples of social_iqa: .* none of its choices"),
    ],
)
def test_wrong_labels(data, task, field, label, words):
    file = data / task / "validation.jsonl"
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    examples[1][field] = label
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    with pytest.raises(UserError, match=WRONG + words):
        tasks.load_tasks([task], data=data)


def test_wrong_labels_of_examples_in_prompts(data):
    file = data / "sst2" / "train.jsonl"
    examples = [json.loads(line) for line in file.read_text().splitlines()]
    examples[2]["idx"] = None
    file.write_text("\n".join(map(json.dumps, examples)) + "\n\n")
    tasks.load_tasks(["sst2"], data=data)  # null in another field and a blank line are fine
    examples[1]["label"] = 7
    file.write_text("\n".join(map(json.dumps, examples)))
    with pytest.raises(UserError, match="line 2 of the prompt examples of sst2: its label names"):
        tasks.load_tasks(["sst2"], data=data)


def test_unknown_tasks(data, monkeypatch):
    root = Path(lm_eval.tasks.__file__).parent
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=root / "glue")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)  # the whole index takes half a minute
    with pytest.raises(UserError, match="--tasks=sst: unknown; there are arc_easy, .* of lm-eval"):
        tasks.load_tasks(["sst"])
    with pytest.raises(UserError, match="--tasks=glue: is a group of tasks"):
        tasks.load_tasks(["glue"], data=data)


_WITHOUT = """
import runpy, sys
class Hiding:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        is_hidden = name.partition(".")[0] == {hidden!r}
        return None if is_hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.argv = {arguments!r}
runpy.run_path("eval.py", run_name="__main__")
"""


def evaluate(workdir, *arguments, hidden="torch"):
    """Runs `eval.py` as if a package were not installed."""
    arguments = ["eval.py", f"--workdir={workdir}", *arguments]
    return run(["-c", _WITHOUT.format(hidden=hidden, arguments=arguments)])


@pytest.mark.slow
def test_command_line_without_torch(data):
    workdir = shutil.copytree(finished_run(), scratch("tasks") / "run")
    before = '{"piqa": {"of": "another run"}, "sst2": {"of": "another run"}}'
    (workdir / "tasks.json").write_text(before)
    flags = ["--tasks=sst2,qqp", f"--tasks-data={data}", "--fewshot=1", "--limit=3"]
    status, stdout, stderr = evaluate(workdir, *flags)
    assert status == 0, stderr
    written = json.loads((workdir / "tasks.json").read_text())
    assert written.pop("piqa") == {"of": "another run"}
    assert written.keys() == {"sst2", "qqp"}
    for entry in written.values():
        assert (entry["fewshot"], entry["examples"], entry["limit"]) == (1, 3, 3)
        assert f"{entry['metrics']['acc']['value']:.4f}" in stdout


ONLY_ON_A_SPLIT = "--split=test: belongs to the evaluation on a split; leave out --tasks and --text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=piqa", "--text=a.txt"], "--text=a.txt: give it without --tasks"),
        (["--limit=3"], "--limit=3: belongs to --tasks or --text=task:NAME"),
        (["--tasks="], "--tasks= names nothing; see --help"),
        (["--split=train"], "--split=train: value should be one of <validation|test>"),
        (["--text=a.txt", "--split=test"], ONLY_ON_A_SPLIT),
        (["--tasks=piqa", "--split=test"], ONLY_ON_A_SPLIT),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path):
    with pytest.raises(UserError) as error:
        call("aoe_jax.eval", f"--workdir={tmp_path}", *arguments)
    assert str(error.value) == message


def test_a_bad_file_of_results(data, tmp_path):
    (tmp_path / "tasks.json").write_text("[]")
    wanted = r"tasks\.json cannot be read: it holds no JSON object; move it away"
    with pytest.raises(UserError, match=wanted):
        tasks.evaluate_tasks(tmp_path, ["piqa"], data=data)


@pytest.mark.slow
def test_without_lm_eval():
    status, _, stderr = evaluate("nowhere", "--tasks=piqa", hidden="lm_eval")
    assert status == 2
    wanted = "error: the package lm_eval is missing; pip install '.[eval]'"
    assert stderr.splitlines()[-1] == wanted

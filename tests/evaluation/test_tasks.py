"""Tasks of lm-eval through the adapter: exact results of a model with known answers."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval.tasks
import numpy as np
import pytest

from aoe_jax.data.corpora import speech_files, split_of
from aoe_jax.errors import UserError
from aoe_jax.evaluation import tasks
from aoe_jax.evaluation.speeches import choice_examples, cloze_examples
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
    report = tasks.score_model(known_model(), loaded, progress=False)
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
    accuracies = {name: known["acc"] for name, known in KNOWN.items()}
    of_eight = [acc for name, acc in accuracies.items() if name not in ("mrpc", "qqp")]
    rows = [line.split() for line in tasks.tasks_table(report).splitlines()[-2:]]
    assert rows[0][:7] == ["the", "paper's", "AVG", "of", "8", "acc", f"{np.mean(of_eight):.4f}"]
    assert rows[1][:5] == ["mean", "of", "10", "acc", f"{np.mean([*accuracies.values()]):.4f}"]
    report.pop("sst2")
    assert "AVG" not in tasks.tasks_table(report) and "mean of 9" in tasks.tasks_table(report)


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
    is_refused("qqp", "--tasks=qqp: the examples in .* cannot be used")


def test_unknown_tasks(data, monkeypatch):
    root = Path(lm_eval.tasks.__file__).parent
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=root / "glue")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)  # the whole index takes half a minute
    known = "--tasks=sst: unknown; there are arc_easy, .*speeches_choice, and all .* of lm-eval"
    with pytest.raises(UserError, match=known):
        tasks.load_tasks(["sst"])
    with pytest.raises(UserError, match="--tasks=glue: is a group of tasks"):
        tasks.load_tasks(["glue"], data=data)


def test_speeches():
    """They are cut alike at every run. The right continuation is the speech's own next words."""
    for split in ("validation", "test"):
        cloze, choice = cloze_examples(split), choice_examples(split)
        assert (cloze, choice) == (cloze_examples(split), choice_examples(split))
        assert 400 < len(cloze) <= 480 and 400 < len(choice) <= 480
        assert all(e["word"].isalpha() and len(e["passage"].split()) >= 39 for e in cloze)
        assert all(len(set(example["continuations"])) == 4 for example in choice)
        labels = np.bincount([example["label"] for example in choice])
        assert labels.shape == (4,) and labels.min() > len(choice) / 5
    passages = [{e["passage"] for e in cloze_examples(split)} for split in ("validation", "test")]
    assert not passages[0] & passages[1]
    files = [file for i, file in enumerate(speech_files()) if split_of(i) == "test"]
    texts = [" ".join(file.read_text().split()) for file in files]
    for example in choice_examples("test")[::20]:
        whole = [f"{example['context']} {text}" for text in example["continuations"]]
        found = [any(text in speech for speech in texts) for text in whole]
        assert found == [i == example["label"] for i in range(4)]


# Hides torch as if it were not installed.
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
    arguments = ["eval.py", f"--workdir={workdir}", *arguments]
    return run(["-c", _WITHOUT.format(hidden=hidden, arguments=arguments)])


@pytest.mark.slow
def test_command_line_without_torch(data):
    workdir = shutil.copytree(finished_run(), scratch("tasks") / "run")
    before = '{"piqa": {"of": "another run"}, "sst2": {"of": "another run"}}'
    (workdir / "tasks.json").write_text(before)
    flags = ["--tasks=sst2,speeches_cloze", f"--tasks-data={data}", "--fewshot=1", "--limit=4"]
    status, stdout, stderr = evaluate(workdir, *flags)
    assert status == 0, stderr
    written = json.loads((workdir / "tasks.json").read_text())
    assert written.pop("piqa") == {"of": "another run"}
    assert written.keys() == {"sst2", "speeches_cloze"} and written["sst2"]["fewshot"] == 1
    assert {entry["examples"] for entry in written.values()} == {4}
    assert written["speeches_cloze"]["metrics"]["perplexity"]["value"] > 1
    assert written["speeches_cloze"]["split"] == "test" and "split" not in written["sst2"]
    for entry in written.values():
        assert entry["limit"] == 4
        assert f"{entry['metrics']['acc']['value']:.4f}" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=piqa", "--text=a.txt"], "--text=a.txt: give it without --tasks"),
        (["--limit=3"], "--limit=3: belongs to --tasks or --text=task:NAME"),
        (["--tasks="], "--tasks= names nothing; see --help"),
        (["--tasks=piqa", "--split=train"], "--split=train: choose one of validation, test"),
        (
            ["--text=a.txt", "--split=test"],
            "--split=test: belongs to the evaluation on a split; leave out --text",
        ),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path):
    with pytest.raises(UserError) as error:
        call("aoe_jax.eval", f"--workdir={tmp_path}", *arguments)
    assert str(error.value) == message


def test_results_of_another_command_meanwhile_stay(data, tmp_path, monkeypatch):
    file = tmp_path / "tasks.json"

    def score_model(*_, **__):
        file.write_text('{"other": {"of": "another command"}}')
        return {"piqa": {"fewshot": 0, "examples": 1, "metrics": {}}}

    monkeypatch.setattr(tasks, "load_tasks", lambda *_, **__: {"tasks": {}})
    monkeypatch.setattr(tasks, "load_model", lambda *_: SimpleNamespace(step=3))
    monkeypatch.setattr(tasks, "score_model", score_model)
    tasks.evaluate_tasks(tmp_path, ["piqa"], data=data)
    written = json.loads(file.read_text())
    assert written.keys() == {"other", "piqa"} and written["piqa"]["step"] == 3


def test_directories_that_are_refused(data, tmp_path):
    (tmp_path / "tasks.json").write_text("[]")
    wanted = r"tasks\.json cannot be read: it holds no JSON object; move it away"
    with pytest.raises(UserError, match=wanted):
        tasks.evaluate_tasks(tmp_path, ["piqa"], data=data)
    with pytest.raises(UserError, match="--workdir=nowhere: no such directory"):
        tasks.evaluate_tasks(Path("nowhere"), ["piqa"], data=data)


@pytest.mark.slow
def test_without_lm_eval():
    status, _, stderr = evaluate("nowhere", "--tasks=piqa", hidden="lm_eval")
    assert status == 2
    wanted = "error: --tasks needs the package lm-eval; run `pip install '.[eval]'`"
    assert stderr.splitlines()[-1] == wanted

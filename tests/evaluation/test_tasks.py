"""lm-eval's tasks through the adapter: exact results of a model whose answers are known, on local
data.
"""

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

from aoe_jax.errors import UserError
from aoe_jax.evaluation import tasks
from aoe_jax.evaluation.harness import HarnessModel
from aoe_jax.evaluation.speeches import choice_examples, cloze_examples
from tests.evaluation.public_tasks import EXAMPLES, KNOWN, known_model, write_examples
from tests.in_process import call
from tests.runs import finished_run, run, scratch


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch, ragged):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tasks, "_BOOTSTRAPS", 20)
    return write_examples(tmp_path / "data")


def test_the_ten_tasks_are_exactly_right(data):
    loaded = tasks.load_tasks(list(KNOWN), data=data)
    report = tasks.score_tasks(HarnessModel(known_model()[0], progress=False), loaded)
    assert list(report) == list(KNOWN)
    for name, known in KNOWN.items():
        assert {
            metric: figure["value"] for metric, figure in report[name]["metrics"].items()
        } == pytest.approx(known)
        examples = report[name]["examples"]
        assert examples == next(
            len(rows) for file, rows in EXAMPLES.items() if file.startswith(f"{name}/")
        )
        assert report[name]["fewshot"] == (
            3 if name in ("mnli", "qnli", "sst2", "mrpc", "qqp") else 0
        )
        acc = report[name]["metrics"]["acc"]
        assert acc["stderr"] == pytest.approx(
            math.sqrt(acc["value"] * (1 - acc["value"]) / (examples - 1))
        )
    assert 0 < report["mrpc"]["metrics"]["f1"]["stderr"] < 1
    mean = sum(known["acc"] for known in KNOWN.values()) / 10
    of_eight = sum(known["acc"] for name, known in KNOWN.items() if name not in ("mrpc", "qqp")) / 8
    rows = [line.split() for line in tasks.tasks_table(report).splitlines()[-2:]]
    assert rows[0][:7] == ["the", "paper's", "AVG", "of", "8", "acc", f"{of_eight:.4f}"]
    assert rows[1][:5] == ["mean", "of", "10", "acc", f"{mean:.4f}"]
    report.pop("sst2")
    assert "AVG" not in tasks.tasks_table(report) and "mean of 9" in tasks.tasks_table(report)


def test_prompts_have_shots_from_the_training_split(data):
    (prompt, *_) = tasks.prompts(tasks.load_tasks(["sst2"], data=data))
    assert prompt.count("Question: Is this sentence positive or negative?\nAnswer:") == 4
    assert prompt.endswith("negative?\nAnswer:")
    (prompt, *_) = tasks.prompts(tasks.load_tasks(["sst2"], fewshot=0, data=data))
    assert prompt == "s 0 .\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert len(tasks.prompts(tasks.load_tasks(["sst2"], data=data), limit=2)) == 2


def test_shots_need_a_training_split(data):
    with pytest.raises(
        UserError, match=r"--fewshot=9: .*sst2/train\.jsonl must hold more than 9 examples"
    ):
        tasks.load_tasks(["sst2"], fewshot=9, data=data)
    (data / "sst2/train.jsonl").unlink()
    tasks.load_tasks(["sst2"], fewshot=0, data=data)
    with pytest.raises(
        UserError, match=r"--fewshot=3: .*sst2/train\.jsonl must hold more than 3 examples"
    ):
        tasks.load_tasks(["sst2"], data=data)


def test_missing_and_bad_data(data):
    (data / "mnli/validation_matched.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"--tasks-data=.*mnli/validation_matched\.jsonl is missing"
    ):
        tasks.load_tasks(["mnli"], data=data)
    (data / "piqa/validation.jsonl").write_text('{"goal": "g", "sol1": "a"}\n')
    with pytest.raises(UserError, match=r"--tasks=piqa: .*cannot be used \(ValueError: "):
        tasks.load_tasks(["piqa"], data=data)
    (data / "qqp/validation.jsonl").write_text("{oh\n")
    with pytest.raises(UserError, match=r"--tasks=qqp: the examples in .* cannot be used"):
        tasks.load_tasks(["qqp"], data=data)


def test_unknown_tasks(data, monkeypatch):
    root = Path(lm_eval.tasks.__file__).parent
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=root / "glue")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)  # the whole index takes half a minute
    with pytest.raises(
        UserError,
        match=r"--tasks=sst: unknown; there are arc_easy, .*speeches_choice, .*such as sst2",
    ):
        tasks.load_tasks(["sst"])
    with pytest.raises(UserError, match="--tasks=glue: is a group of tasks"):
        tasks.load_tasks(["glue"], data=data)


def test_speeches_are_cut_alike_at_every_run():
    for split in ("validation", "test"):
        cloze, choice = cloze_examples(split), choice_examples(split)
        assert (cloze, choice) == (cloze_examples(split), choice_examples(split))
        assert 400 < len(cloze) <= 480 and 400 < len(choice) <= 480
        assert all(
            example["word"].isalpha() and len(example["passage"].split()) >= 39 for example in cloze
        )
        assert all(len(set(example["continuations"])) == 4 for example in choice)
        labels = np.bincount([example["label"] for example in choice])
        assert labels.shape == (4,) and labels.min() > len(choice) / 5
    assert not {e["passage"] for e in cloze_examples("validation")} & {
        e["passage"] for e in cloze_examples("test")
    }


def test_speeches_follow_each_other():
    """The right continuation is what the speech says next, the others are from elsewhere."""
    from aoe_jax.data.corpora import speech_files, split_of

    texts = [
        " ".join(file.read_text().split())
        for i, file in enumerate(speech_files())
        if split_of(i) == "test"
    ]
    for example in choice_examples("test")[::20]:
        whole = [
            f"{example['context']} {continuation}" for continuation in example["continuations"]
        ]
        assert [any(text in speech for speech in texts) for text in whole] == [
            i == example["label"] for i in range(4)
        ]


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
    return run(
        [
            "-c",
            _WITHOUT.format(
                hidden=hidden, arguments=["eval.py", f"--workdir={workdir}", *arguments]
            ),
        ]
    )


@pytest.mark.slow
def test_command_line_without_torch(data):
    workdir = shutil.copytree(finished_run(), scratch("tasks") / "run")
    names = "sst2,speeches_cloze"
    (workdir / "tasks.json").write_text(
        '{"piqa": {"of": "another run"}, "sst2": {"of": "another run"}}'
    )
    status, stdout, stderr = evaluate(
        workdir, f"--tasks={names}", f"--tasks-data={data}", "--fewshot=1", "--limit=4"
    )
    assert status == 0, stderr
    written = json.loads((workdir / "tasks.json").read_text())
    assert written.pop("piqa") == {"of": "another run"}
    assert sorted(written) == sorted(names.split(","))
    assert {entry["examples"] for entry in written.values()} == {4} and written["sst2"][
        "fewshot"
    ] == 1
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
        (
            ["--tasks=speeches_cloze", "--split=train"],
            "--split=train: choose one of validation, test",
        ),
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

    def score_tasks(*_):
        file.write_text('{"other": {"of": "another command"}}')
        return {"piqa": {"fewshot": 0, "examples": 1, "metrics": {}}}

    monkeypatch.setattr(tasks, "load_tasks", lambda *_, **__: {"tasks": {}})
    monkeypatch.setattr(tasks, "load_model", lambda *_: SimpleNamespace(step=3))
    monkeypatch.setattr(tasks, "HarnessModel", lambda *_, **__: None)
    monkeypatch.setattr(tasks, "score_tasks", score_tasks)
    tasks.evaluate_tasks(tmp_path, ["piqa"], data=data)
    written = json.loads(file.read_text())
    assert written.keys() == {"other", "piqa"} and written["piqa"]["step"] == 3


def test_a_damaged_file_of_results(data, tmp_path):
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(
        UserError, match=r"tasks\.json cannot be read: it holds no JSON object; move it away"
    ):
        tasks.evaluate_tasks(tmp_path, ["piqa"], data=data)


def test_a_missing_workdir(data):
    with pytest.raises(UserError, match="--workdir=nowhere: no such directory"):
        tasks.evaluate_tasks(Path("nowhere"), ["piqa"], data=data)


@pytest.mark.slow
def test_without_lm_eval():
    status, _, stderr = evaluate("nowhere", "--tasks=piqa", hidden="lm_eval")
    assert status == 2
    assert (
        stderr.splitlines()[-1]
        == "error: --tasks needs the package lm-eval; run `pip install '.[eval]'`"
    )

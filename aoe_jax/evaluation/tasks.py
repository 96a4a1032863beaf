"""Evaluates models on tasks of EleutherAI's lm-eval.

Prompts, splits and metrics are those of lm-eval's task definitions. Data sets are loaded from the
Hugging Face hub or from a folder of JSON lines.
"""

import io
import logging
import math
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import jax
import lm_eval.tasks
from lm_eval.evaluator import evaluate
from tabulate import tabulate

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError, shown
from aoe_jax.evaluation.harness import HarnessModel
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.model.decoding import check_decodes
from aoe_jax.storage.files import read_json, write_report

log = logging.getLogger(__name__)
logging.getLogger("lm_eval").setLevel(logging.ERROR)
os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval must not fork: JAX has threads, so forks are unsafe

# Task of the paper -> (folder of lm-eval that defines it, number of shots). The folder is given,
# because reading lm-eval's index of all tasks takes half a minute.
_PAPER = {
    "arc_easy": ("arc", 0),
    "piqa": ("piqa", 0),
    "social_iqa": ("siqa", 0),
    "winogrande": ("winogrande", 0),
    "hellaswag": ("hellaswag", 0),
    **dict.fromkeys(("mnli", "qnli", "sst2", "mrpc", "qqp"), ("glue", 3)),
}
PAPER_TASKS = tuple(_PAPER)
AVERAGED = PAPER_TASKS[:8]  # their mean is AVG in the paper's Tables 2, 3 and 5
_BOOTSTRAPS = 1000  # resamples, for standard errors without a formula, such as that of F1
_SHOTS_SEED = 1234  # lm-eval's default


def load_tasks(names, fewshot=None, data: Path | None = None):
    """Loads tasks and their data sets for `lm_eval.evaluator.evaluate`.

    `names` are tasks, groups or tags of lm-eval. `fewshot` is the number of examples with answers
    in each prompt; None means the paper's number for tasks of the paper, and lm-eval's number for
    other tasks. `data` is a folder of files `TASK/SPLIT.jsonl` with the splits and fields of the
    hub's data sets, such as `mnli/validation_matched.jsonl`; None loads data sets from the hub.

    Raises `UserError` if a task is unknown, or its data set cannot be loaded or has wrong fields.
    """
    names = list(dict.fromkeys(names))
    index = _index(names)
    specs = [_on_local_data(index, name, data) if data else name for name in names]
    with _quiet():
        try:
            loaded = index.load(specs)
        except Exception as e:  # data sets and templates fail in many ways
            raise UserError(f"--tasks={','.join(names)}: {_cause(e, data)}") from e
    if data:
        loaded = {"tasks": loaded["tasks"]}  # drops the groups that _on_local_data made
    for name, task in loaded["tasks"].items():
        _, default = _PAPER.get(name, (None, task.get_config("num_fewshot") or 0))
        shots = default if fewshot is None else fewshot
        if data and shots:
            _check_shots(index.task_index[name].cfg, name, data, shots)
        if data and task.OUTPUT_TYPE == "multiple_choice":
            _check_answers(name, task, data, shots)
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_SHOTS_SEED)
    return loaded


def _index(names):
    """Returns lm-eval's index of all tasks, or a smaller index that contains all `names`."""
    root = Path(lm_eval.tasks.__file__).parent
    if all(name in _PAPER for name in names):
        folders = [root / folder for folder in {_PAPER[name][0] for name in names}]
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    log.info("reading lm-eval's index of tasks, which takes a while")
    index = lm_eval.tasks.TaskManager()
    for name in names:
        known = f"{', '.join(PAPER_TASKS)}, and all {len(index.all_tasks)} tasks of lm-eval"
        wanted = f"unknown; there are {known}"
        require_flag(name in index.all_tasks, "tasks", name, wanted)
    return index


def _on_local_data(index, name, data):
    """Returns a group of lm-eval with only this task, which loads its data set from `data`."""
    wanted = "is a group of tasks; with --tasks-data name single tasks"
    require_flag(name in index.all_subtasks, "tasks", name, wanted)
    task = index.task_index[name].cfg
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {key: task.get(key) for key in keys}
    evaluated = splits["test_split"] or splits["validation_split"]
    files = {split: data / name / f"{split}.jsonl" for split in splits.values() if split}
    found = {split: str(file) for split, file in files.items() if file.is_file()}
    wanted = f"{files[evaluated]} is missing; write the examples of {name} to it, one per line"
    require_flag(evaluated in found, "tasks-data", data, wanted)
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": found}}
    local |= {key: split if split in found else None for key, split in splits.items()}
    return {"group": f"local {name}", "task": [{"task": name, **local}]}


def _check_answers(name, task, data, shots):
    """Raises `UserError` for the first example whose label names none of its choices."""
    answer = task.doc_to_text if task.multiple_input else task.doc_to_target
    splits = {"evaluated": task.eval_docs} | ({"prompt": task.fewshot_docs()} if shots else {})
    for kind, examples in splits.items():
        for number, example in enumerate(examples, 1):
            try:
                choices, found = task.doc_to_choice(example), answer(example)
            except Exception as e:  # templates fail in many ways
                choices, found = [], f"{type(e).__name__}: {e}"
            answers = found if isinstance(found, list) else [found]
            numbers = range(len(choices))
            is_right = all(a in choices or (type(a) is int and a in numbers) for a in answers)
            where = f"line {number} of the {kind} examples of {name}"
            wanted = f"{where}: its label names none of its choices ({shown(found)})"
            require_flag(is_right, "tasks-data", data, wanted)


def _check_shots(config, name, data, shots):
    split = config.get("fewshot_split") or config.get("training_split")
    file = data / name / f"{split}.jsonl"
    wanted = f"{file} must hold more than {shots} examples"
    if split is None:
        wanted = f"{name} has no split with examples for prompts; give --fewshot=0"
    enough = file.is_file() and len(file.read_bytes().splitlines()) > shots
    require_flag(enough, "fewshot", shots, wanted)


def _cause(error, data):
    while error.__cause__ and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if data:
        wanted = "each line must be a JSON object with the fields of the hub's data set"
        return f"the examples in {data} cannot be used ({reason}); {wanted}"
    wanted = "give --tasks-data=DIR, see docs/evaluation.md"
    return f"the data set cannot be loaded from the hub ({reason}); {wanted}"


@contextmanager
def _quiet():
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # an undefined F1 counts as 0
        yield


def prompts(tasks, limit=None):
    """Returns the prompts of the first `limit` examples of each task, without duplicates."""
    texts = {}
    with _quiet():
        for task in tasks["tasks"].values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            texts |= dict.fromkeys(instance.args[0] for instance in task.instances)
    return list(texts)


def score_model(model: Model, tasks, limit=None):
    """Evaluates a model on the first `limit` examples of each task (None: all examples).

    Returns `{task: {"fewshot", "examples", "metrics": {metric: {"value", "stderr"}}}}`. A standard
    error is None if it is undefined, as with one example; groups may have no `fewshot`, `examples`.
    """
    settings = {"limit": limit, "bootstrap_iters": _BOOTSTRAPS, "log_samples": False}
    with _quiet():
        results = evaluate(HarnessModel(model), tasks, **settings)
    return {
        name: {
            "fewshot": results["n-shot"].get(name),
            "examples": results["n-samples"].get(name, {}).get("effective"),
            "metrics": _metrics(figures),
        }
        for name, figures in (results["results"] | results.get("groups", {})).items()
    }


def _metrics(figures):
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` -> `{"acc": {"value": 0.5, "stderr": 0.1}}`."""
    found = {}
    for key, value in figures.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{answer_filter}")
            name = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
            stderr = stderr if isinstance(stderr, float) else None
            found[name] = {"value": float(value), "stderr": stderr}
    return found


def tasks_table(report):
    """Formats the report of `score_model`, with the paper's AVG if all tasks of AVG were run."""
    rows = []
    for task, entry in report.items():
        head = [task, entry["fewshot"], entry["examples"]]
        for metric, figure in entry["metrics"].items():
            rows.append([*head, metric, figure["value"], figure["stderr"]])
            head = ["", "", ""]
    if all(task in report for task in AVERAGED):
        accuracies = [report[task]["metrics"]["acc"] for task in AVERAGED]
        mean = sum(figure["value"] for figure in accuracies) / len(accuracies)
        errors = [figure["stderr"] for figure in accuracies]
        stderr = None if None in errors else math.hypot(*errors) / len(errors)
        rows.append(["the paper's AVG", "", "", "acc", mean, stderr])
    headers = ["task", "shots", "examples", "metric", "value", "stderr"]
    alignment = ("left", "right", "right", "left", "right", "right")
    return tabulate(rows, headers, "plain", ".4f", missingval="-", colalign=alignment)


def evaluate_tasks(workdir: Path, names, step="newest", mesh=None, limit=None, **settings):
    """Evaluates a checkpoint on tasks, prints a table, and returns what `score_model` returns.

    Writes the results to `tasks.json`, where the results of other tasks stay. The arguments are
    passed to `models.load_model`, `score_model` and `load_tasks`. Raises `UserError` if a task or
    the model cannot be loaded, or if the model's method does not support a task.
    """
    file = workdir / "tasks.json"
    _known(file)  # raises before the long work if the file is damaged
    tasks = load_tasks(names, **settings)  # before the model, so that a wrong name fails early
    model = load_model(workdir, step, mesh)
    if any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values()):
        check_decodes(model.decoder)
    report = score_model(model, tasks, limit)
    if jax.process_index() == 0:
        print(tasks_table(report))
        about = {"step": model.step, "limit": limit}
        entries = {name: about | entry for name, entry in report.items()}
        # The file is read again, because another command may have added other tasks meanwhile.
        write_report(file, _known(file) | entries, "workdir")
    return report


def _known(file):
    """Returns the results in a `tasks.json`; {} if it does not exist."""
    return read_json(file, "move it away") if file.exists() else {}

"""Tasks of EleutherAI's lm-eval: `evaluate_tasks(workdir, names)` prints a table with standard
errors, writes `tasks.json`.

Prompts, splits and metrics are those of lm-eval's own definitions. Data sets come from the hub, or
from a folder: see `load_tasks`.
"""

import difflib
import io
import logging
import math
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from aoe_jax.errors import UserError

try:
    import lm_eval.tasks
    from lm_eval.evaluator import evaluate
except ModuleNotFoundError as e:
    if e.name.partition(".")[0] not in ("lm_eval", "datasets"):
        raise
    raise UserError("--tasks needs the package lm-eval; run `pip install '.[eval]'`") from e

from aoe_jax.evaluation.run import check_split
from aoe_jax.evaluation.speeches import SPEECH_TASKS, speech_task
from aoe_jax.json_files import read_json, write_json

log = logging.getLogger(__name__)

# The paper's: where lm-eval defines them, whose index of all its tasks takes half a minute; and the
# shots.
_PAPER = {
    "arc_easy": ("arc", 0),
    "piqa": ("piqa", 0),
    "social_iqa": ("siqa", 0),
    "winogrande": ("winogrande", 0),
    "hellaswag": ("hellaswag", 0),
    "mnli": ("glue", 3),
    "qnli": ("glue", 3),
    "sst2": ("glue", 3),
    "mrpc": ("glue", 3),
    "qqp": ("glue", 3),
}
PAPER_TASKS = tuple(_PAPER)
AVERAGED = PAPER_TASKS[:8]  # the AVG of the paper's Tables 2, 3 and 5
_BOOTSTRAPS = 1000  # for standard errors without a formula, such as that of F1
_SHOTS_SEED = 1234  # lm-eval's own


def load_tasks(names, fewshot=None, data: Path | None = None, split="test"):
    """Tasks of lm-eval, ready to be evaluated.

    Args:
      names: tasks, groups or tags of lm-eval, or `speeches.SPEECH_TASKS`.
      fewshot: examples with answers in each prompt; None: the paper's for its tasks, for others
        lm-eval's.
      data: a folder with `TASK/SPLIT.jsonl`, where `SPLIT` is what lm-eval calls the split, such as
        `sst2/train.jsonl` and `mnli/validation_matched.jsonl`: JSON lines with the fields of the
        hub's data set. None: from the hub.
      split: of the speeches.

    Returns:
      What `lm_eval.evaluator.evaluate` takes.

    Raises:
      UserError: an unknown task, or a data set that can't be had, read, or has other fields.
    """
    names = list(dict.fromkeys(names))
    public = [name for name in names if name not in SPEECH_TASKS]
    if len(public) < len(names):
        check_split(split)
    index = _index(public)
    specs = [speech_task(name, split) for name in names if name in SPEECH_TASKS]
    specs += [_on_local_data(index, name, data) for name in public] if data else public
    with _quiet():
        try:
            loaded = index.load(specs)
        except Exception as e:  # data sets and templates fail in many ways
            raise UserError(f"--tasks={','.join(names)}: {_cause(e, data)}") from e
    if data:
        loaded = {"tasks": loaded["tasks"]}  # without the groups that they came as
    for name, task in loaded["tasks"].items():
        shots = (
            _PAPER.get(name, (None, task.get_config("num_fewshot") or 0))[1]
            if fewshot is None
            else fewshot
        )
        if data and shots and name not in SPEECH_TASKS:
            config = index.task_index[name].cfg
            shots_split = config.get("fewshot_split") or config.get("training_split")
            if shots_split is None:
                raise UserError(
                    f"--fewshot={shots}: {name} has no split to take examples from; give --fewshot=0"
                )
            file = data / name / f"{shots_split}.jsonl"
            if not file.is_file() or len(file.read_bytes().splitlines()) <= shots:
                raise UserError(
                    f"--fewshot={shots}: {file} must hold more than {shots} examples to take them from"
                )
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_SHOTS_SEED)
    return loaded


def _index(names):
    """lm-eval's index of its tasks, of those that matter.

    Raises:
      UserError: a name isn't in it.
    """
    root = Path(lm_eval.tasks.__file__).parent
    if all(name in _PAPER for name in names):
        folders = {_PAPER[name][0] for name in names}
        return lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=[root / folder for folder in folders]
        )
    log.info("reading lm-eval's index of tasks, which takes a while")
    index = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in index.all_tasks:
            close = difflib.get_close_matches(name, index.all_tasks, 5)
            raise UserError(
                f"--tasks={name}: unknown; there are {', '.join((*PAPER_TASKS, *SPEECH_TASKS))}, and all "
                f"{len(index.all_tasks)} of lm-eval{', such as ' + ', '.join(close) if close else ''}"
            )
    return index


def _on_local_data(index, name, data):
    """The task as a group of one, whose data set is a folder."""
    if name not in index.all_subtasks:
        raise UserError(f"--tasks={name}: is a group of tasks; with --tasks-data name single ones")
    task, folder = index.task_index[name].cfg, data / name
    splits = {
        kind: task.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")
    }
    evaluated = splits["test"] or splits["validation"]
    files = {split: str(folder / f"{split}.jsonl") for split in splits.values() if split}
    found = {split: file for split, file in files.items() if Path(file).is_file()}
    if evaluated not in found:
        raise UserError(
            f"--tasks-data={data}: {files[evaluated]} is missing; it holds the examples of {name}, one a line"
        )
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": found}}
    local |= {f"{kind}_split": split if split in found else None for kind, split in splits.items()}
    return {"group": f"local {name}", "task": [{"task": name, **local}]}


def _cause(error, data):
    """What went wrong with a data set, in a line."""
    while error.__cause__ and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if data:
        return f"the examples in {data} can't be used ({reason}); each line is a JSON object with the fields of the hub's"
    return f"the data set can't be had from the hub ({reason}); give --tasks-data=DIR, see docs/evaluation.md"


@contextmanager
def _quiet():
    """Without lm-eval's remarks on its own tasks; and without processes of its own, which JAX's
    threads forbid.
    """
    logger = logging.getLogger("lm_eval")
    level, alone = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module="sklearn"
            )  # of samples on which F1 isn't defined, and taken as 0
            yield
    finally:
        logger.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]


def prompts(tasks, limit=None):
    """What the tasks of `load_tasks` ask, each text once, a list; `limit` as in `score_tasks`."""
    texts = {}
    with _quiet():
        for task in tasks["tasks"].values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            texts |= dict.fromkeys(instance.args[0] for instance in task.instances)
    return list(texts)


def score_tasks(harness_model, tasks, limit=None):
    """Runs tasks of `load_tasks` on a `HarnessModel`.

    Args:
      harness_model: any model of lm-eval.
      tasks: of `load_tasks`.
      limit: examples of each task, the first ones; None: all.

    Returns:
      `{task: {"fewshot", "examples", "metrics": {metric: {"value", "stderr"}}}}`; a standard error
      is None where there is none, as for a single example. Groups have no shots and examples of
      their own: None.
    """
    with _quiet():
        results = evaluate(
            harness_model, tasks, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
        )
    return {
        name: {
            "fewshot": results["n-shot"].get(name),
            "examples": results["n-samples"].get(name, {}).get("effective"),
            "metrics": _metrics(figures),
        }
        for name, figures in (results["results"] | results.get("groups", {})).items()
    }


def _metrics(figures):
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` -> `{"acc": {"value": 0.5, "stderr": 0.1}}`;
    other filters named.
    """
    found = {}
    for key, value in figures.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{answer_filter}")
            name = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
            found[name] = {
                "value": float(value),
                "stderr": stderr if isinstance(stderr, float) else None,
            }
    return found


def tasks_table(report):
    """The report of `score_tasks` as lines of text, a row a metric; of the paper's tasks also the
    mean accuracy.
    """
    width = max(map(len, (*report, "mean")))
    rows = [f"{'task':<{width}}  shots  examples  {'metric':<12}  {'value':>9}  {'stderr':>7}"]
    for task, entry in report.items():
        head = f"{task:<{width}}  {_shown(entry['fewshot']):>5}  {_shown(entry['examples']):>8}"
        for metric, figure in entry["metrics"].items():
            rows.append(
                f"{head}  {metric:<12}  {figure['value']:>9.4f}  {_shown(figure['stderr'], '.4f'):>7}"
            )
            head = " " * len(head)
    for averaged, name in ((AVERAGED, "the paper's AVG of"), (PAPER_TASKS, "mean of")):
        accuracies = [report[task]["metrics"]["acc"] for task in averaged if task in report]
        if len(accuracies) < 2 or (averaged == AVERAGED and len(accuracies) < len(AVERAGED)):
            continue
        stderrs = [
            math.nan if figure["stderr"] is None else figure["stderr"] for figure in accuracies
        ]
        stderr = math.hypot(*stderrs) / len(accuracies)
        mean = sum(figure["value"] for figure in accuracies) / len(accuracies)
        rows.append(
            f"{f'{name} {len(accuracies)}':<{width + 17}}  {'acc':<12}  {mean:>9.4f}  {stderr:>7.4f}"
        )
    return "\n".join(rows)


def _shown(value, form=""):
    return "-" if value is None else format(value, form)


def evaluate_tasks(
    workdir: Path,
    names,
    fewshot=None,
    data: Path | None = None,
    limit=None,
    split="test",
    step="newest",
    mesh=None,
):
    """Scores a checkpoint on tasks: prints a table, and enters each task in `tasks.json`, which
    keeps the others.

    Args:
      workdir: what `models.load_model` reads.
      names, fewshot, data, split: as in `load_tasks`.
      limit: examples of each task, the first ones; None: all.
      step: which checkpoint.
      mesh: as in `models.load_model`.

    Returns:
      What `score_tasks` returns.

    Raises:
      UserError: as `load_tasks`, `models.load_model`, `scoring.Scorer` and, of tasks that generate,
        `check_decodes`.
    """
    import jax

    from aoe_jax.evaluation.harness import HarnessModel
    from aoe_jax.evaluation.models import load_model
    from aoe_jax.model.decoding import check_decodes

    if not workdir.is_dir():
        raise UserError(
            f"--workdir={workdir}: no such directory; name the workdir of a training run"
        )
    file = workdir / "tasks.json"
    known = read_json(file, "move it away") if file.exists() else {}
    tasks = load_tasks(names, fewshot, data, split)  # first, for it finds mistakes soonest
    model = load_model(workdir, step, mesh)
    if any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values()):
        check_decodes(model.decoder)  # before anything is scored
    is_first = jax.process_index() == 0
    report = score_tasks(HarnessModel(model, progress=is_first), tasks, limit)
    if not is_first:
        return report
    print(tasks_table(report))
    made = {"step": model.step, "split": split, "limit": limit}
    write_json(file, known | {name: made | entry for name, entry in report.items()})
    log.info("wrote %s", file)
    return report

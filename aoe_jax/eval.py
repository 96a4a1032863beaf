"""Evaluates a model on a held-out split, on tasks or on a text.

    python eval.py --workdir=DIR [--tasks=NAME,... | --text=FILE]

By default the command computes the nll on a held-out split. `--tasks` computes the accuracy on
tasks of lm-eval, and `--text` the load of experts on a text or on a task's prompts (`task:NAME`).
"""

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.config.checks import require_flag

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "the held-out split")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_MESH = cli.define_mesh_flag()
_TASKS = flags.DEFINE_list("tasks", None, "tasks of lm-eval")
_TEXT = flags.DEFINE_string("text", None, "a text file, or task:NAME for the prompts of a task")
_FEWSHOT = flags.DEFINE_integer("fewshot", None, "examples in a prompt; default: the paper's", 0)
_LIMIT = flags.DEFINE_integer("limit", None, "the first N examples of each task; default: all", 1)
_CORPORA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_DATA = flags.DEFINE_string("tasks-data", None, "a folder of TASK/SPLIT.jsonl; default: the hub")


def main():
    workdir, text = cli.path_of(_WORKDIR, in_store=True), _TEXT.value or ""
    cli.refuse_empty(_TASKS, _TEXT, _DATA)
    require_flag(not (_TASKS.value and text), "text", text, "give it without --tasks")
    if not _TASKS.value and not text.startswith("task:"):
        cli.refuse("belongs to --tasks or --text=task:NAME", _FEWSHOT, _LIMIT, _DATA)
    if _TASKS.value or text:
        wanted = "belongs to the evaluation on a split; leave out --tasks and --text"
        cli.refuse(wanted, _SPLIT, _CORPORA)
    distributed.start()
    model = {"step": _STEP.value, "mesh": _MESH.value}
    settings = {
        "limit": _LIMIT.value,
        "fewshot": _FEWSHOT.value,
        "data": cli.path_of(_DATA) if _DATA.value else None,
    }
    if _TASKS.value:
        from aoe_jax.evaluation.tasks import evaluate_tasks

        evaluate_tasks(workdir, _TASKS.value, **model, **settings)
    elif text:
        from aoe_jax.evaluation.evaluate import evaluate_text

        evaluate_text(workdir, text, **model, **settings)
    else:
        from aoe_jax.evaluation.evaluate import evaluate_workdir

        evaluate_workdir(workdir, _SPLIT.value, **model, data=_CORPORA.value)


command = cli.command(main)

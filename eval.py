"""Evaluates a model: `python eval.py --workdir=DIR` on a held-out split, with `--tasks=NAME,...` on
tasks of lm-eval.

`--text=FILE` shows the load of its experts on a text instead, `--text=task:NAME` on the prompts of
a task.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_SPLIT = flags.DEFINE_string("split", "test", "validation or test")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint: newest, best (lowest validation nll) or a number of steps"
)
_MESH = cli.define_mesh_flag()
_TASKS = flags.DEFINE_list(
    "tasks", None, "tasks of lm-eval, and speeches_cloze and speeches_choice, of --split"
)
_TEXT = flags.DEFINE_string("text", None, "a text file, or task:NAME for the prompts of a task")
_FEWSHOT = flags.DEFINE_integer(
    "fewshot", None, "examples with answers in a prompt; by default the paper's", 0
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "examples of each task, the first ones; by default all", 1
)
_DATA = flags.DEFINE_string(
    "tasks-data", None, "a folder with TASK/SPLIT.jsonl, instead of data sets from the hub"
)


def main():
    """Evaluates."""
    workdir = Path(cli.required(_WORKDIR))
    for flag in (_TASKS, _TEXT):
        if flag.present and not flag.value:
            raise UserError(f"--{flag.name}= names nothing; see --help")
    if _TASKS.value and _TEXT.value:
        raise UserError(f"--text={_TEXT.value}: give it without --tasks")
    of_tasks = [flag for flag in (_FEWSHOT, _LIMIT, _DATA) if flag.present]
    if of_tasks and not (_TASKS.value or (_TEXT.value or "").startswith("task:")):
        raise UserError(
            f"--{of_tasks[0].name}={of_tasks[0].value}: belongs to --tasks or --text=task:NAME"
        )
    distributed.start()
    model = (_SPLIT.value, _STEP.value, _MESH.value)
    examples = (
        _FEWSHOT.value,
        _DATA.value and Path(_DATA.value).expanduser(),
        _LIMIT.value,
        *model,
    )
    if _TASKS.value:
        from aoe_jax.evaluation.tasks import evaluate_tasks

        evaluate_tasks(workdir, _TASKS.value, *examples)
    elif _TEXT.value:
        from aoe_jax.evaluation.text import show_load_on

        show_load_on(workdir, _TEXT.value, *examples)
    else:
        from aoe_jax.evaluation.run import evaluate_workdir

        evaluate_workdir(workdir, *model)


if __name__ == "__main__":
    cli.run(main)

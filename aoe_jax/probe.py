"""Do experts know what they are good at? `python -m aoe_jax.probe --checkpoint=DIR [--text=FILE]
[--tasks=NAME,...]`.

Drops the router of a model, lets each expert choose by a norm of what it has computed at a node,
and reports nll, accuracy on tasks, agreement with the router and time, beside the router and a
random choice: the paper's Tables 1, 6 and 7. The text is a file, or else the held-out split of the
run that the model is of. Prints a table, writes `probe.json` into `--output`.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the directory of a model or of a training run"
)
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint of a run: newest, best or a number of steps"
)
_MESH = cli.define_mesh_flag()
_TEXT = flags.DEFINE_string("text", None, "a text file; by default the --split of the run's corpus")
_SPLIT = flags.DEFINE_string(
    "split", "validation", "validation or test, of the run's corpus and of tasks cut from it"
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 100_000, "tokens of the text to take, the first ones, about", 1
)
_TASKS = flags.DEFINE_list(
    "tasks", None, "tasks of lm-eval, and speeches_cloze and speeches_choice"
)
_FEWSHOT = flags.DEFINE_integer(
    "fewshot", None, "examples with answers in a prompt; by default the paper's", 0
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "examples of each task, the first ones; by default all", 1
)
_DATA = flags.DEFINE_string(
    "tasks-data", None, "a folder with TASK/SPLIT.jsonl, instead of data sets from the hub"
)
_OUTPUT = flags.DEFINE_string("output", None, "where probe.json goes; by default into --checkpoint")


def main():
    """Probes."""
    checkpoint = Path(cli.required(_CHECKPOINT)).expanduser()
    distributed.start()
    from aoe_jax.evaluation.probing import probe_checkpoint

    of_tasks = [flag for flag in (_FEWSHOT, _LIMIT, _DATA) if flag.present]
    if of_tasks and not _TASKS.value:
        raise UserError(f"--{of_tasks[0].name}={of_tasks[0].value}: belongs to --tasks")
    tasks = {"names": _TASKS.value, "fewshot": _FEWSHOT.value, "limit": _LIMIT.value}
    tasks["data"] = Path(_DATA.value).expanduser() if _DATA.value else None
    probe_checkpoint(
        checkpoint,
        Path(_OUTPUT.value).expanduser() if _OUTPUT.value else checkpoint,
        step=_STEP.value,
        mesh=_MESH.value,
        text=_TEXT.value,
        split=_SPLIT.value,
        n_tokens=_TOKENS.value,
        tasks=tasks,
    )


if __name__ == "__main__":
    cli.run(main)

"""Evaluates a router MoE whose experts are chosen by norms, not by the router.

    python -m aoe_jax.probe --checkpoint=DIR [--text=FILE]

Each token is processed by the top-k experts, those with the largest norm of an intermediate result
such as `x W_gate`. The command evaluates several results and norms, the router itself and random
experts. It prints a table of nll, accuracy on tasks, agreement with the router and time, like the
paper's Tables 1, 6 and 7, and writes `probe.json`.
"""

from absl import flags

from aoe_jax import cli, distributed

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "the directory of a model or a training run")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_MESH = cli.define_mesh_flag()
_TEXT = flags.DEFINE_string("text", None, "a text file; default: the --split of the run's corpus")
_CORPORA = flags.DEFINE_string("data", None, "corpora, written like data.name; default: the run's")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "the held-out split")
_TOKENS = flags.DEFINE_integer("tokens", 100_000, "first tokens of each corpus", 1)
_TASKS = flags.DEFINE_list("tasks", None, "tasks of lm-eval")
_FEWSHOT = flags.DEFINE_integer("fewshot", None, "examples in a prompt; default: the paper's", 0)
_LIMIT = flags.DEFINE_integer("limit", None, "the first N examples of each task; default: all", 1)
_DATA = flags.DEFINE_string("tasks-data", None, "a folder of TASK/SPLIT.jsonl; default: the hub")
_OUTPUT = flags.DEFINE_string("output", None, "where probe.json goes; default: --checkpoint")


def main():
    checkpoint = cli.path_of(_CHECKPOINT)
    cli.refuse_empty(_TASKS, _TEXT, _DATA, _OUTPUT)
    distributed.start()
    from aoe_jax.evaluation.probing import probe_checkpoint

    if _TEXT.value:
        cli.refuse("names other tokens than --text; give one of them", _CORPORA, _SPLIT)
    if not _TASKS.value:
        cli.refuse("belongs to --tasks", _FEWSHOT, _LIMIT, _DATA)
    probe_checkpoint(
        checkpoint,
        cli.path_of(_OUTPUT) if _OUTPUT.value else checkpoint,
        step=_STEP.value,
        mesh=_MESH.value,
        text=_TEXT.value,
        corpora=_CORPORA.value,
        split=_SPLIT.value,
        n_tokens=_TOKENS.value,
        tasks=_TASKS.value,
        limit=_LIMIT.value,
        fewshot=_FEWSHOT.value,
        data=cli.path_of(_DATA) if _DATA.value else None,
    )


command = cli.command(main)

"""Evaluates a run: `python eval.py --workdir=DIR [--split=validation] [--step=N]` prints a table, writes `DIR/eval.json`."""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_SPLIT = flags.DEFINE_string("split", "test", "validation or test")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint: newest, best (lowest validation nll) or a number of steps"
)


def main():
    """Evaluates."""
    workdir = Path(cli.required(_WORKDIR))
    distributed.start()
    from aoe_jax.evaluation.run import evaluate_workdir

    evaluate_workdir(workdir, _SPLIT.value, _STEP.value)


if __name__ == "__main__":
    cli.run(main)

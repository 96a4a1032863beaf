"""Evaluates a run: `python eval.py --workdir=DIR [--split=validation]` prints a table, writes `DIR/eval.json`."""

from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_SPLIT = flags.DEFINE_string("split", "test", "validation or test")


def main():
    """Evaluates."""
    workdir = Path(cli.required(_WORKDIR))
    distributed.start()
    from aoe_jax.evaluation.run import evaluate_workdir

    evaluate_workdir(workdir, _SPLIT.value)


if __name__ == "__main__":
    cli.run(main)

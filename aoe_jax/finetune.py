"""Trains a model further.

    python -m aoe_jax.finetune --model=DIR --workdir=DIR [--config.train.steps=N ...]

The configuration is `configs/finetune.py`: architecture and tokenizer are the model's. Set corpus,
steps and learning rate. The other flags are those of `python -m aoe_jax.train --help`.
"""

from absl import flags

from aoe_jax import cli, train

_MODEL = flags.DEFINE_string("model", None, "the directory of a model as safetensors")


def main():
    cli.refuse("name a model with --model=DIR", flags.FLAGS["config"])
    flags.FLAGS.config = f"aoe_jax:finetune:{cli.path_of(_MODEL)}"
    train.main()


command = cli.command(main)

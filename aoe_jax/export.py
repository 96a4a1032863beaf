"""Writes the model of a run as safetensors, for transformers.

    python -m aoe_jax.export --workdir=DIR --output=DIR

The directory has `config.json`, safetensors, the tokenizer in the format of `transformers`, a model
card (`README.md`), and the configuration of the run. `eval.py --workdir=OUTPUT --data=CORPORA`
evaluates the model, and `train.init_from` starts another run from it. The architecture is Mixtral,
OLMoE, Qwen2-MoE, Qwen3-MoE, dots.llm1 or GLM-4.5 (for dense models Llama or Qwen3) if one of these
can express the whole model. Otherwise it is an architecture of this project
(`aoe_jax/formats/architectures.py`), and for an AoE the directory has the classes that
`transformers` needs to load it.
"""

from absl import flags

from aoe_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_OUTPUT = flags.DEFINE_string("output", None, "the directory to write, which must not exist yet")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_MESH = cli.define_mesh_flag()
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the tensors")


def main():
    workdir, output = cli.path_of(_WORKDIR, in_store=True), cli.path_of(_OUTPUT, in_store=True)
    from aoe_jax.conversion.exporting import export  # imported late, because it starts JAX

    export(workdir, output, _STEP.value, _DTYPE.value, _MESH.value)


command = cli.command(main)

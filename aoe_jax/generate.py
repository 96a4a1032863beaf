"""Continues texts.

    python -m aoe_jax.generate --workdir=DIR --prompt=TEXT [--prompt=TEXT ...]

The continuation of the first prompt is printed while it is generated. Several prompts are continued
in one batch. `--contrast=BETA` turns on self-contrast (`evaluation/contrast.py`).
"""

import sys

from absl import flags

from aoe_jax import cli, distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_STEP = flags.DEFINE_string("step", "newest", "checkpoint: newest, best (nll) or a number of steps")
_MESH = cli.define_mesh_flag()
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "a text to continue; empty: begins a new text")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "how many tokens to add at most", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "of the softmax; 0: the likeliest token", 0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw among this many likeliest tokens", 1)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "draw among the likeliest tokens of this total probability", 0.0, 1.0
)
_CONTRAST = flags.DEFINE_float("contrast", None, "beta of self-contrast, such as 0.5", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random draws", 0)


def main():
    workdir = cli.path_of(_WORKDIR, in_store=True)
    if _TEMPERATURE.value == 0:
        cli.refuse("has no effect with --temperature=0; leave it out", _TOP_K, _TOP_P)
    distributed.start()
    import jax

    from aoe_jax.evaluation.generation import Sampling, continuations
    from aoe_jax.evaluation.models import load_model

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    prompts = _PROMPT.value
    model = load_model(workdir, _STEP.value, _MESH.value)
    write = sys.stdout.write if jax.process_index() == 0 else lambda text: None
    settings = {"sampling": sampling, "seed": _SEED.value, "chunk": 8}
    shown = 0
    for texts in continuations(model, prompts, _MAX_TOKENS.value, _CONTRAST.value, **settings):
        first = prompts[0] + texts[0]  # printed only now, so that log lines come before the prompt
        write(first[shown:])
        sys.stdout.flush()
        shown = max(shown, len(first))
    write("\n")
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        write(f"\n{prompt}{text}\n")
    sys.stdout.flush()


command = cli.command(main)

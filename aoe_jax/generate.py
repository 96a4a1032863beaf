"""Continues texts: `python -m aoe_jax.generate --workdir=DIR --prompt=TEXT [--prompt=TEXT ...]
[--max_tokens=N]`.

The text appears as it comes. Several prompts are continued together and printed one after the
other. `--contrast=BETA` draws by the model against itself with badly chosen experts, see
`evaluation/contrast.py`.
"""

import sys
from pathlib import Path

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run, or of a model")
_STEP = flags.DEFINE_string(
    "step", "newest", "which checkpoint: newest, best (lowest validation nll) or a number of steps"
)
_MESH = cli.define_mesh_flag()
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [""], "a text to continue; an empty one begins a new text"
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "how many tokens to add at most")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "of the softmax that tokens are drawn by; 0: the likeliest token"
)
_TOP_K = flags.DEFINE_integer("top_k", None, "draw among so many of the likeliest tokens")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "draw among the fewest likeliest tokens whose probability reaches this"
)
_CONTRAST = flags.DEFINE_float(
    "contrast",
    None,
    "beta of self-contrast, such as 0.5 (arXiv 2405.14507); temperature and others apply to the contrasted logits",
)
_ALPHA = flags.DEFINE_float(
    "alpha", 0.1, "with --contrast: no token less likely than this, relatively to the likeliest"
)
_STRONG_K = flags.DEFINE_integer(
    "strong_k",
    None,
    "with --contrast: experts per token of the strong pass; by default the model's own choice",
)
_WEAK_RANK = flags.DEFINE_integer(
    "weak_rank", 2, "with --contrast: the rank by score of the one expert of the weak pass, from 1"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")


def continuations(model, prompts, max_tokens, contrast=None, **settings):
    """Continues texts with a `Model`; contrast is that of `Generator`, settings are those of
    `Generator.stream`.

    Yields:
      What each text has been continued by so far, a list of texts. Characters of which some bytes
      are still to come are held back.
    """
    from aoe_jax.evaluation.generation import Generator

    tokenizer = model.tokenizer
    encoded = [[model.start, *tokens.tolist()] for tokens in tokenizer.encode(prompts)]
    so_far = [[] for _ in prompts]
    for new in Generator(model, contrast).stream(encoded, max_tokens, **settings):
        for row, tokens in zip(so_far, new, strict=True):
            row.extend(tokens)
        # Decoded with the prompt: some tokenizers drop the blank before the first word of what they
        # are given.
        yield [
            tokenizer.decode([*prompt, *row])
            .removeprefix(tokenizer.decode(prompt))
            .rstrip("\N{REPLACEMENT CHARACTER}")
            for prompt, row in zip(encoded, so_far, strict=True)
        ]


def main():
    """Generates."""
    workdir = Path(cli.required(_WORKDIR))
    if _MAX_TOKENS.value < 1:
        raise UserError(f"--max_tokens={_MAX_TOKENS.value}: must be 1 or greater")
    distributed.start()
    import jax

    from aoe_jax.evaluation.contrast import Contrast
    from aoe_jax.evaluation.generation import Sampling
    from aoe_jax.evaluation.models import load_model

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    contrast = None
    if _CONTRAST.value is not None:
        passes = {"strong_k": _STRONG_K.value, "weak_rank": _WEAK_RANK.value}
        contrast = Contrast(_CONTRAST.value, _ALPHA.value, **passes)
    elif idle := [flag for flag in (_ALPHA, _STRONG_K, _WEAK_RANK) if flag.present]:
        raise UserError(
            f"--{idle[0].name}={idle[0].value}: belongs to --contrast; set that too, or leave this out"
        )
    prompts = _PROMPT.value
    model = load_model(workdir, _STEP.value, _MESH.value)
    write = sys.stdout.write if jax.process_index() == 0 else lambda text: None
    shown = 0
    settings = {"contrast": contrast, "sampling": sampling, "seed": _SEED.value, "chunk": 8}
    for texts in continuations(model, prompts, _MAX_TOKENS.value, **settings):
        first = (
            prompts[0] + texts[0]
        )  # the prompt only now: what is logged in between would stand in its line
        write(first[shown:])
        sys.stdout.flush()
        shown = max(shown, len(first))
    write("\n")
    for prompt, text in zip(prompts[1:], texts[1:], strict=True):
        write(f"\n{prompt}{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)

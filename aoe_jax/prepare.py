"""Makes a token store from texts.

    python -m aoe_jax.prepare --input=GLOB --tokenizer=T --output=DIR

The input is JSON lines (.jsonl, .ndjson, .json) or plain text (.txt), also with .gz or .zst, or
Parquet. After a kill or a stop, the same command goes on where it was. `--check` finds damaged
shards, `--repair` writes them again.
"""

import logging
from functools import partial

from absl import flags

from aoe_jax import cli
from aoe_jax.data.preparation import Settings, check, prepare, repair
from aoe_jax.data.tokenizer import cores
from aoe_jax.errors import UserError

log = logging.getLogger("aoe_jax.prepare")  # not __name__, which is __main__

_INPUT = flags.DEFINE_multi_string(
    "input", [], "a glob pattern of files, '**' for folders of any depth"
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "a Hugging Face tokenizer.json, a SentencePiece model, or bpe:N, byte-level BPE of N tokens",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "the directory of the token store, also gs://... or s3://..."
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", Settings.text_field, "the field of JSON or column of Parquet with the text"
)
_VALIDATION = flags.DEFINE_float(
    "validation", Settings.validation, "share of the documents for validation"
)
_TEST = flags.DEFINE_float("test", Settings.test, "share of the documents for test")
_PROCESSES = flags.DEFINE_integer(
    "processes", cores(), "processes that tokenise, a core each", lower_bound=1
)
_CHECK = flags.DEFINE_bool("check", False, "read the store whole, and name damaged shards")
_REPAIR = flags.DEFINE_bool("repair", False, "write damaged shards again, from the same input")


def main():
    output = cli.path_of(_OUTPUT, in_store=True)
    if not (_CHECK.value or _REPAIR.value):
        cli.required(_INPUT)
        tokenizer = cli.required(_TOKENIZER)
        settings = Settings(tokenizer, _TEXT_FIELD.value, _VALIDATION.value, _TEST.value)
        prepare(_INPUT.value, settings, output, _PROCESSES.value)
    elif (_CHECK.value and (_INPUT.value or _REPAIR.value)) or _TOKENIZER.value:
        raise UserError(
            "--check takes --output alone, --repair --output and --input; leave out the rest"
        )
    elif _REPAIR.value:
        damaged = repair(output, _PROCESSES.value, _INPUT.value)
        names = ", ".join(damaged) or "nothing, all shards are as they were written"
        log.info(f"wrote again: {names}")
    elif damaged := check(output):
        raise UserError(
            f"--output={output}: damaged shards: {', '.join(damaged)}; --repair writes them again"
        )
    else:
        log.info("all shards are as they were written")


command = partial(cli.run, main)

if __name__ == "__main__":
    command()

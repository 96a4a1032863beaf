"""Makes a token store from texts.

    python -m aoe_jax.prepare --input=FOLDER --tokenizer=T --output=DIR

The input is Parquet, or JSON lines (.jsonl, .ndjson, .json) or plain text (.txt), both of which may
be compressed (.gz, .zst). After a stop the same command continues. `--check` finds damaged shards.
"""

import logging
import os

from absl import flags

from aoe_jax import cli
from aoe_jax.data.preparation import Settings, check, prepare
from aoe_jax.errors import UserError

log = logging.getLogger("aoe_jax.prepare")  # `__name__` is `__main__` with `python -m`

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

_INPUT = flags.DEFINE_multi_string("input", [], "a folder, or a glob pattern with * and **")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "a Hugging Face tokenizer.json, a SentencePiece model, a folder with one, ORG/NAME of the Hub, "
    "or bpe:N, byte-level BPE of N tokens",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "the directory of the token store, also gs://... or s3://..."
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", Settings.text_field, "the field of JSON or column of Parquet with the text"
)
_VALIDATION = flags.DEFINE_float(
    "validation", None, "share of the documents for validation, by default 0.005 or more"
)
_TEST = flags.DEFINE_float("test", None, "share of the documents for test, as --validation")
_PROCESSES = flags.DEFINE_integer("processes", _CORES, "tokenising processes, one per core", 1)
_ENGINE = cli.define_engine_flag()
_CHECK = flags.DEFINE_bool("check", False, "read the whole store, and name damaged shards")


def main():
    output = cli.path_of(_OUTPUT, in_store=True)
    if not _CHECK.value:
        cli.required(_INPUT)
        tokenizer = cli.required(_TOKENIZER)
        settings = Settings(tokenizer, _TEXT_FIELD.value, _VALIDATION.value, _TEST.value)
        if _ENGINE.value == "ray":
            cli.refuse("leave it out with --engine=ray, which uses all free cores", _PROCESSES)
        prepare(_INPUT.value, settings, output, _PROCESSES.value, _ENGINE.value)
    elif _INPUT.value or _TOKENIZER.value:
        raise UserError("--check takes --output alone; leave out --input and --tokenizer")
    elif damaged := check(output):
        raise UserError(
            f"--output={output}: damaged shards: {', '.join(damaged)}; prepare the input again, "
            "into a new folder"
        )
    else:
        log.info("all shards are as they were written")


command = cli.command(main)

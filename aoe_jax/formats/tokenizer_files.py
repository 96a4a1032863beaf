"""The tokenizer of a model in its directory, as our own reader and `transformers.AutoTokenizer`
take it.
"""

import json
import logging
import shutil
from pathlib import Path

import tokenizers

from aoe_jax.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    saved_tokenizer,
)
from aoe_jax.json_files import read_json, write_json

log = logging.getLogger(__name__)

# Beside the tokenizer itself: what a model of the hub has of settings and chat templates.
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
SETTINGS += ("chat_template.json", "chat_template.jinja")


def write_tokenizer(folder: Path, output: Path, max_len: int):
    """Writes the tokenizer that was saved in `folder`, and settings by which no special token is
    added to a text.

    A `tokenizer.json` that says otherwise by itself, as many of the hub do, is changed in that
    alone.

    Returns:
      What `config.json` says of tokens: texts end with a token, and begin with none.

    Raises:
      UserError: it can't be read.
      OSError: it can't be written.
    """
    file = saved_tokenizer(folder)
    tokenizer = load_tokenizer(file, setting="tokenizer")
    shutil.copyfile(file, output / file.name)
    if isinstance(tokenizer, SentencePieceTokenizer):
        kind = "LlamaTokenizer"
    else:
        kind = "PreTrainedTokenizerFast"
        _add_no_tokens(output / file.name)
    settings = {
        "tokenizer_class": kind,
        "bos_token": None,
        "eos_token": tokenizer.end_name,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
    }
    write_json(output / "tokenizer_config.json", settings)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.end_of_text, "pad_token_id": None}
    write_json(output / "generation_config.json", ids)
    return ids


def _add_no_tokens(file: Path):
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    if not tokenizer.num_special_tokens_to_add(is_pair=False):
        return
    spec = json.loads(file.read_text())
    file.write_text(json.dumps(spec | {"post_processor": None}, ensure_ascii=False))
    log.info("the tokenizer adds tokens to a text; here it adds none, as in training")


def read_prefix(folder: Path, tokenizer: Tokenizer, begin_token: int | None) -> list[int]:
    """The tokens that the tokenizer of a model puts before a text in `transformers`.

    A `tokenizer.json` says so itself. For a SentencePiece model alone it is the one that texts
    begin with, if `tokenizer_config.json` says so.

    Raises:
      UserError: `tokenizer_config.json` can't be read.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.prefix
    file = folder / "tokenizer_config.json"
    settings = read_json(file, "remove it to do without") if file.exists() else {}
    return [begin_token] if begin_token is not None and settings.get("add_bos_token") else []


def copy_tokenizer(folder: Path, output: Path):
    """Copies the tokenizer of a model, where it has one, and its settings as they are; raises
    `OSError`.
    """
    for name in ("tokenizer.json", "tokenizer.model", *SETTINGS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)

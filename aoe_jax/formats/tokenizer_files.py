"""The tokenizer in the directory of a model, for `aoe_jax` and `transformers.AutoTokenizer`."""

import json
import logging
import shutil
from pathlib import Path

import tokenizers

from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from aoe_jax.formats.loading import is_model
from aoe_jax.storage.files import read_json, write_json

log = logging.getLogger(__name__)

# File patterns of the tokenizer, its settings and chat templates in models of the hub.
_FILES = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
_FILES += ("generation_config.json", "chat_template.*")


def write_tokenizer(folder: Path, output: Path, max_len: int):
    """Writes the tokenizer of a run or a model, and returns `{field of config.json: token}`.

    The files of a model's tokenizer are copied. A run's tokenizer is written so that, like
    training, it adds no special tokens. Raises `UserError` if the tokenizer cannot be read.
    """
    if is_model(folder):
        for pattern in _FILES:
            for file in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(file, output / file.name)
        known = read_json(folder / "config.json")
        return {name: known.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer = load_tokenizer(saved_tokenizer(folder), setting="tokenizer")
    tokenizer.save(output)
    file, kind = output / tokenizer.file_name, "LlamaTokenizer"
    if not isinstance(tokenizer, SentencePieceTokenizer):
        kind = "PreTrainedTokenizerFast"
        if tokenizers.Tokenizer.from_file(str(file)).num_special_tokens_to_add(is_pair=False):
            spec = json.loads(file.read_text()) | {"post_processor": None}
            file.write_text(json.dumps(spec, ensure_ascii=False))
            log.info("the tokenizer adds special tokens; its copy adds none, as training did not")
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


def read_prefix(folder: Path, tokenizer, begin_token: int | None) -> list[int]:
    """Returns the tokens that a model's tokenizer adds before every text in `transformers`.

    `tokenizer.json` defines them. For a SentencePiece model they are `[begin_token]` if
    `tokenizer_config.json` sets `add_bos_token`. Raises `UserError` if that file is unreadable.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.prefix
    file = folder / "tokenizer_config.json"
    settings = read_json(file, "remove it to add no begin token") if file.exists() else {}
    return [begin_token] if begin_token is not None and settings.get("add_bos_token") else []

"""What a token store says of itself."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aoe_jax.data.tokenizer import Tokenizer
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json

FORMAT_VERSION = 2
PLAN_FILE = (
    "plan.json"  # how a store was made from its input; only those of `aoe_jax.data.prepare` have it
)


def write_manifest(
    directory: Path, corpus: str, fingerprint: str, tokenizer: Tokenizer, splits: Mapping[str, dict]
):
    """Write `manifest.json`, which makes a store of the shards in `directory`.

    Args:
        directory: of the store.
        corpus: the name of the corpus.
        fingerprint: what changes when the text does.
        tokenizer: the tokenizer that the shards are written with.
        splits: what `SplitWriter.finish` returned, by split.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus,
        "corpus_fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.token_count,
        "end_of_text": tokenizer.end_of_text,
        "dtype": token_dtype(tokenizer).name,
        # The stream begins with an end-of-text token that is in no shard.
        "splits": {name: split | {"tokens": 1 + split["tokens"]} for name, split in splits.items()},
    }
    write_json(directory / "manifest.json", manifest)


def read_manifest(directory: Path) -> dict:
    """The manifest of a token store; `UserError` if it is missing, damaged, or of another version
    of this package.
    """
    path = directory / "manifest.json"
    if not path.exists():
        if not directory.is_dir():
            raise UserError(f"token store {str(directory)!r}: no such folder")
        if (directory / PLAN_FILE).exists():
            raise UserError(
                f"token store {str(directory)!r}: isn't finished; the `python -m aoe_jax.data.prepare` that began it goes on"
            )
        raise damaged(directory, "manifest.json is missing")
    try:
        version = read_json(path).get("format_version")
    except UserError as error:
        raise damaged(directory, "manifest.json is damaged") from error
    if version != FORMAT_VERSION:
        raise damaged(
            directory, f"manifest.json has format version {version}, not {FORMAT_VERSION}"
        )
    return read_json(path)


def damaged(directory: Path, reason: str) -> UserError:
    """The error that says what to do about a damaged store."""
    if (directory / PLAN_FILE).exists():
        cure = f"`python -m aoe_jax.data.prepare --repair --output={directory}` writes damaged shards again"
    else:
        cure = "delete this folder to have it built again"
    return UserError(f"token store {str(directory)!r}: {reason}; {cure}")


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """In what tokens are stored."""
    return np.dtype(np.uint16 if tokenizer.token_count <= 2**16 else np.uint32)

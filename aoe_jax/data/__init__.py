"""Text corpora as token streams: prepared once, read by random access."""

from dataclasses import dataclass
from pathlib import Path

from aoe_jax.data.token_store import TokenStore, open_token_store, prepare


@dataclass(frozen=True)
class TokenisedCorpus:
    """A corpus ready for training: one token store a split, and the directory where they lie."""

    directory: Path
    train: TokenStore
    validation: TokenStore
    test: TokenStore


def open_corpus(data, vocab_size: int) -> TokenisedCorpus:
    """Opens the corpus of a `DataConfig`, preparing it first where that has not been done; errors as in `prepare`."""
    directory = prepare(data, vocab_size)
    return TokenisedCorpus(
        directory, *(open_token_store(directory, split) for split in ("train", "validation", "test"))
    )

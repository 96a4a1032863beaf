"""The corpora of a run, tokenised and opened."""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from aoe_jax.config import DataConfig
from aoe_jax.data import SPLITS
from aoe_jax.data.building import cached_token_stores
from aoe_jax.data.corpora import load_corpus, slug
from aoe_jax.data.manifest import read_manifest
from aoe_jax.data.token_store import TokenStore, open_token_store
from aoe_jax.data.tokenizer import check_vocab_size, load_tokenizer, saved_tokenizer
from aoe_jax.errors import UserError


@dataclass(frozen=True)
class TokenisedCorpus:
    """One corpus or several, ready for training: the token stores of each split by their source,
    all of one tokenizer.
    """

    train: dict[str, TokenStore]
    validation: dict[str, TokenStore]
    test: dict[str, TokenStore]
    weights: (
        tuple[Fraction, ...] | None
    )  # the sources' shares of the tokens seen in training; None: by size
    tokenizer: Path  # the tokenizer's file

    @property
    def identities(self) -> list[str]:
        """What each source is, in a word: the name of its corpus and a hash of text, tokenizer and
        splits.
        """
        return [_identity(store.manifest) for store in self.train.values()]


def open_corpus(data: DataConfig, vocab_size: int) -> TokenisedCorpus:
    """Open the corpora of a `DataConfig`, preparing first those that are not prepared yet.

    Without `data.tokenizer` the prepared stores' is that of all.

    Raises:
        UserError: as in `cached_token_stores` and `open_token_store`; or the prepared stores are of
            several tokenizers, or of another than `data.tokenizer`.
    """
    directories = {
        source.label: Path(source.path) for source in data.sources if source.name == "prepared"
    }
    tokenizer = (
        _tokenizer_of(directories, data.tokenizer, vocab_size) if directories else data.tokenizer
    )
    corpora = {
        source.label: load_corpus(source.name, source.path, data.cache, data.text_field)
        for source in data.sources
        if source.name != "prepared"
    }
    if corpora:
        prepared = cached_token_stores(list(corpora.values()), tokenizer, vocab_size, data.cache)
        directories |= dict(zip(corpora, prepared, strict=True))
    labels, weights = (
        [source.label for source in data.sources],
        tuple(source.weight for source in data.sources),
    )
    stores = {
        split: {label: open_token_store(directories[label], split) for label in labels}
        for split in SPLITS
    }
    return TokenisedCorpus(
        **stores,
        weights=None if None in weights else weights,
        tokenizer=saved_tokenizer(directories[labels[0]]),
    )


def _tokenizer_of(directories: dict[str, Path], given: str | None, vocab_size: int) -> str:
    """The file of the tokenizer that the prepared stores share, which must be the given one, where
    there is one.
    """
    for directory in directories.values():
        if not (directory / "manifest.json").is_file():
            raise UserError(
                f"data.name: 'prepared' names {directory}, which is no token store; make one with "
                "`python -m aoe_jax.data.prepare`"
            )
    hashes = {
        str(directory): read_manifest(directory)["tokenizer_sha256"]
        for directory in directories.values()
    }
    if given:
        hashes = {f"data.tokenizer={given!r}": load_tokenizer(given).sha256} | hashes
    if len(set(hashes.values())) > 1:
        named = "; ".join(f"{name} has {sha256[:12]}" for name, sha256 in hashes.items())
        raise UserError(
            f"data.name: all corpora must be of one tokenizer, but {named}. Prepare them again with the same tokenizer"
        )
    path = given or str(saved_tokenizer(next(iter(directories.values()))))
    check_vocab_size(load_tokenizer(path), vocab_size)
    return path


def _identity(manifest: dict) -> str:
    tokens = [manifest["splits"][split]["tokens"] for split in SPLITS]
    content = json.dumps([manifest["corpus_fingerprint"], manifest["tokenizer_sha256"], tokens])
    return f"{slug(manifest['corpus'])}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

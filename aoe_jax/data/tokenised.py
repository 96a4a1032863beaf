"""The corpora of a run, tokenised once and opened."""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from tqdm import tqdm

from aoe_jax.config.data import DataConfig, SourceConfig
from aoe_jax.data import SPLITS
from aoe_jax.data.corpora import Corpus, load_corpus, slug
from aoe_jax.data.token_store import (
    FORMAT_VERSION,
    TokenStore,
    read_manifest,
    staged,
    write_manifest,
    write_splits,
)
from aoe_jax.data.tokenizer import (
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    saved_tokenizer,
    train_tokenizer,
)
from aoe_jax.errors import UserError
from aoe_jax.storage.files import exclusive, new_folder
from aoe_jax.storage.paths import is_remote, parsed_path
from aoe_jax.storage.retry import patiently

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenisedCorpus:
    """The token store of each source in each split, and their common tokenizer."""

    train: dict[str, TokenStore]
    validation: dict[str, TokenStore]
    test: dict[str, TokenStore]
    weights: tuple[Fraction, ...] | None  # shares of the tokens seen in training; None: by size
    tokenizer: Path  # the tokenizer's file

    @property
    def identities(self) -> list[str]:
        """For each source the name of its corpus with a hash of text, tokenizer and splits."""
        return [_identity(store.manifest) for store in self.train.values()]


def open_corpus(data: DataConfig, vocab_size: int) -> TokenisedCorpus:
    """Opens the corpora of a `DataConfig`; those that have no token store yet are tokenised first.

    Without `data.tokenizer`, all corpora use the tokenizer of the prepared stores. Raises
    `UserError` as `cached_token_stores` and `TokenStore` do, and if the prepared stores have
    several tokenizers, or another than `data.tokenizer`.
    """
    what = f"data.name={data.name!r}: cannot be opened, or tokenised in data.cache={data.cache!r}"
    return patiently(what, partial(_open_at_once, data, vocab_size))


def _open_at_once(data: DataConfig, vocab_size: int) -> TokenisedCorpus:
    cache, tokenizer = _cache(data), data.tokenizer
    paths = {source.label: _path_of(source, data) for source in data.sources}
    prepared = {s.label: paths[s.label] for s in data.sources if s.name == "prepared"}
    origins = {label: path for label, path in prepared.items() if is_remote(path)}
    directories = prepared | {label: staged(path, cache) for label, path in origins.items()}
    if prepared:
        tokenizer = _shared_tokenizer(list(directories.values()), tokenizer, vocab_size)
    corpora = {
        label: load_corpus(source.name, paths[label] and str(paths[label]), cache, data.text_field)
        for label, source in zip(paths, data.sources, strict=True)
        if source.name != "prepared"
    }
    if corpora:
        stores = cached_token_stores(list(corpora.values()), tokenizer, vocab_size, cache)
        directories |= dict(zip(corpora, stores, strict=True))
    return _opened(data.sources, directories, origins)


def _cache(data: DataConfig) -> Path:
    return parsed_path(data.cache, "config.data.cache").absolute()


def _path_of(source: SourceConfig, data: DataConfig):
    """The full path of a source; None if it has none. Raises `UserError` if it cannot be used."""
    if source.path is None:
        return None
    is_prepared, field = source.name == "prepared", "name" if data.path is None else "path"
    try:
        path = parsed_path(source.path, f"config.data.{field}", in_store=is_prepared)
    except UserError as error:
        if is_prepared or "://" not in source.path:
            raise
        wanted = "aoe_jax.prepare reads texts in a store, and data.name=prepared its output"
        raise UserError(f"{error}; {wanted}") from error
    return path if is_remote(path) else path.absolute()


def opened_before(data: DataConfig, identities: list[str]) -> TokenisedCorpus | None:
    """The corpora with these `identities`, from the cache; None if it lacks one. No path of the
    configuration is opened.
    """
    found = {}
    for manifest in _cache(data).glob("tokens/*/manifest.json"):
        with contextlib.suppress(UserError):
            found[_identity(read_manifest(manifest.parent))] = manifest.parent
    if len(data.sources) != len(identities) or not found.keys() >= {*identities}:
        return None
    labels = [source.label for source in data.sources]
    return _opened(data.sources, dict(zip(labels, map(found.get, identities), strict=True)), {})


def _identity(manifest: dict) -> str:
    tokens = [manifest["splits"][split]["tokens"] for split in SPLITS]
    content = [manifest["corpus_fingerprint"], manifest["tokenizer_sha256"], tokens]
    return f"{slug(manifest['corpus'])}-{_short_hash(content)}"


def _opened(
    sources: Sequence[SourceConfig], directories: Mapping[str, Path], origins: Mapping
) -> TokenisedCorpus:
    """The corpora in `directories`; those with an origin are staged from an object store."""
    weights, labels = tuple(source.weight for source in sources), [s.label for s in sources]
    stores = {
        split: {
            label: TokenStore(directories[label], split, origins.get(label)) for label in labels
        }
        for split in SPLITS
    }
    return TokenisedCorpus(
        **stores,
        weights=None if None in weights else weights,
        tokenizer=saved_tokenizer(directories[sources[0].label]),
    )


def _shared_tokenizer(directories: list[Path], given: str | None, vocab_size: int) -> str:
    """The tokenizer's file of all prepared stores, which must be `given` if that is not None."""
    hashes = {f"data.tokenizer={given!r}": load_tokenizer(given).sha256} if given else {}
    for directory in directories:
        if not (directory / "manifest.json").is_file():
            raise UserError(
                f"data.name: 'prepared' names {directory}, which is no token store; correct the "
                "path, or make one with `python -m aoe_jax.prepare`"
            )
        hashes[str(directory)] = read_manifest(directory)["tokenizer_sha256"]
    if len(set(hashes.values())) > 1:
        named = "; ".join(f"{name} has {sha256[:12]}" for name, sha256 in hashes.items())
        raise UserError(
            f"data.name: all corpora must have the same tokenizer, but {named}. Prepare them again "
            "with one tokenizer"
        )
    path = given or str(saved_tokenizer(directories[0]))
    check_vocab_size(load_tokenizer(path), vocab_size)
    return path


def cached_token_stores(
    corpora: list[Corpus], tokenizer: str | None, vocab_size: int, cache: str
) -> list[Path]:
    """Directories of the corpora's token stores, which are built if they do not exist.

    A store is `<cache>/tokens/<corpus name>-<hash of the corpus and the tokenizer>`, so another
    tokenizer, vocabulary size or text makes another store. If several processes share the cache,
    one builds a store and the others wait; where a lock excludes only processes of the same host,
    each host builds it, and the first one counts. `tokenizer` is the path of a file; if it is None,
    byte-level BPE of `vocab_size` tokens is trained on the train splits of all corpora. Raises
    `UserError` if the tokenizer or a text cannot be used, or `vocab_size` is too small.
    """
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        check_vocab_size(given, vocab_size)
    spec = given.sha256 if given else f"byte-level BPE of {vocab_size} tokens"
    if not given and len(corpora) > 1:
        spec = [spec, [corpus.fingerprint for corpus in corpora]]
    directories = []
    for corpus in corpora:
        key = _short_hash([FORMAT_VERSION, corpus.fingerprint, spec])
        directories.append(Path(cache, "tokens", f"{slug(corpus.name)}-{key}"))
    if all(directory.exists() for directory in directories):
        logger.info(f"token store: using {', '.join(map(str, directories))}")
        return directories
    for corpus, directory in zip(corpora, directories, strict=True):
        with exclusive(directory.with_name(f".{directory.name}.lock")):
            if not directory.exists():
                started = time.monotonic()
                if not given:
                    texts = (text for corpus in corpora for text in corpus.documents("train"))
                    given = train_tokenizer(texts, vocab_size)
                build_token_store(corpus, given, directory)
                seconds = time.monotonic() - started
                logger.info(f"token store: built {directory} in {seconds:.1f} s")
        given = given or load_tokenizer(saved_tokenizer(directory))
    return directories


def _short_hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def build_token_store(corpus: Corpus, tokenizer: Tokenizer, directory: Path):
    """Tokenises a corpus into `directory`, which is created only when it is complete.

    One process of a host at a time may do this. Memory is bounded by a batch of documents or the
    longest document. Raises `UserError` as `write_splits` does, and if a split has no documents.
    """
    with new_folder(directory) as new:
        splits = write_splits(new, _documents(corpus), tokenizer)
        for split, numbers in splits.items():
            if numbers["documents"] == 0:
                raise UserError(
                    f"data.name={corpus.name!r}: its {split} split has no text; give a larger "
                    "corpus"
                )
        tokenizer.save(new)
        write_manifest(new, corpus.name, corpus.fingerprint, tokenizer, splits)


def _documents(corpus: Corpus) -> Iterator[tuple[str, str]]:
    with tqdm(desc=f"tokenising {corpus.name}", unit="B", unit_scale=True, delay=5) as progress:
        for split in SPLITS:
            for text in corpus.documents(split):
                yield split, text
                progress.update(len(text))

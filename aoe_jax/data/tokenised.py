"""Opens the corpora of a run as token stores."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from aoe_jax.config.data import DataConfig, SourceConfig
from aoe_jax.config.run import Config
from aoe_jax.data import SPLITS, token_store
from aoe_jax.data.token_store import TokenStore
from aoe_jax.errors import UserError
from aoe_jax.storage.paths import is_remote, local_copy, parsed_path
from aoe_jax.storage.retry import patiently

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenisedCorpus:
    """The token stores of a run, by split and source label. All stores have the same tokenizer."""

    train: dict[str, TokenStore]
    validation: dict[str, TokenStore]
    test: dict[str, TokenStore]
    weights: tuple[Fraction, ...] | None  # relative weights in training; None: by size
    tokenizer: Path  # the tokenizer's file

    @property
    def identities(self) -> list[str]:
        """A hash for each source. It depends on text, tokenizer and split sizes, not on a path."""
        return [_identity(store.manifest) for store in self.train.values()]


def with_vocabulary(config: Config) -> Config:
    """Replaces a `model.vocab_size` of None by the number of tokens of the tokenizer."""
    data, size = config.data, config.model.vocab_size
    if size is None and data.tokenizer:
        from aoe_jax.data.tokenizer import load_tokenizer  # slow to import

        size = load_tokenizer(data.tokenizer).token_count
    elif size is None:
        path = _path_of(next(s for s in data.sources if s.name == "prepared"), data)
        manifest = patiently(f"{path} cannot be read", partial(token_store.read_manifest, path))
        size = manifest["vocab_size"]
    return replace(config, model=replace(config.model, vocab_size=size))


def open_corpus(data: DataConfig, vocab_size: int) -> TokenisedCorpus:
    """Opens the corpora of a `DataConfig`, and first tokenises those without a token store.

    Without `data.tokenizer`, all corpora use the tokenizer of the prepared stores, if there are
    any. Raises `UserError` if a corpus, a store or a tokenizer cannot be used, or if the tokenizers
    of prepared stores differ from each other or from `data.tokenizer`.
    """
    what = f"data.name={data.name!r}: cannot be opened, or tokenised in data.cache={data.cache!r}"
    return patiently(what, partial(_open_at_once, data, vocab_size))


def _open_at_once(data: DataConfig, vocab_size: int) -> TokenisedCorpus:
    cache, tokenizer = parsed_path(data.cache, "config.data.cache"), data.tokenizer
    paths = {source.label: _path_of(source, data) for source in data.sources}
    directories = {}
    for source in data.sources:
        if source.name == "prepared":
            path = paths[source.label]
            if is_remote(path):
                token_store.read_manifest(path)  # refuses a bad store before it is copied
            directories[source.label] = local_copy(path, cache)
    if directories:
        tokenizer = _shared_tokenizer(list(directories.values()), tokenizer, vocab_size)
    texts = [source for source in data.sources if source.name != "prepared"]
    if texts:
        # Imported only here, because prepared stores need neither TFDS nor tokenizer libraries.
        from aoe_jax.data.corpora import load_corpus

        where = {label: path and str(path) for label, path in paths.items()}
        corpora = [load_corpus(s.name, where[s.label], cache, data.text_field) for s in texts]
        stores = cached_token_stores(corpora, tokenizer, vocab_size, cache)
        directories |= {s.label: store for s, store in zip(texts, stores, strict=True)}
    weights = tuple(source.weight for source in data.sources)
    splits = {
        split: {label: TokenStore(directories[label], split) for label in paths} for split in SPLITS
    }
    file = token_store.saved_tokenizer(directories[data.sources[0].label])
    return TokenisedCorpus(**splits, weights=None if None in weights else weights, tokenizer=file)


def _path_of(source: SourceConfig, data: DataConfig):
    """The full path of a source; None if its `path` is None. Raises `UserError` for a bad path."""
    if source.path is None:
        return None
    field = "name" if data.path is None else "path"
    return parsed_path(source.path, f"config.data.{field}", in_store=source.name == "prepared")


def _identity(manifest: dict) -> str:
    tokens = [manifest["splits"][split]["tokens"] for split in SPLITS]
    content = [manifest["corpus_fingerprint"], manifest["tokenizer_sha256"], tokens]
    return token_store.short_hash(content)


def _shared_tokenizer(directories: list[Path], given: str | None, vocab_size: int) -> str:
    """Returns `given`, or if it is None, the path of the tokenizer's file in the prepared stores.
    Raises `UserError` unless the stores and `given` all have the same tokenizer.
    """
    files = {f"data.tokenizer={given!r}": given} if given else {}
    for directory in directories:
        manifest = token_store.read_manifest(directory)
        files[str(directory)] = token_store.saved_tokenizer(directory)
    if len(files) > 1:
        from aoe_jax.data.tokenizer import load_tokenizer  # slow to import

        found = {name: load_tokenizer(file).identity[:12] for name, file in files.items()}
        named = "; ".join(f"{name} has {identity}" for name, identity in found.items())
        wanted = "all corpora must have the same tokenizer"
        if len(set(found.values())) > 1:
            raise UserError(f"data.name: {wanted}, but {named}. Prepare them again with one")
    token_store.check_vocab_size(manifest["vocab_size"], vocab_size)
    return given or str(token_store.saved_tokenizer(directories[0]))


def cached_token_stores(
    corpora: Sequence, tokenizer: str | None, vocab_size: int, cache: Path
) -> list[Path]:
    """Returns the directory of each `Corpus`'s token store, after building the missing stores.

    `tokenizer` is the path of a file. If None, byte-level BPE with `vocab_size` tokens is
    trained on the train splits of all corpora. The folder of a store is `NAME-HASH` in
    `<cache>/tokens`. The hash depends on the text and the tokenizer, so a change of either makes
    a new store. If several processes share the cache, one builds a store and the others wait. On a
    network disk whose locks work only within a host, one process of every host builds the store,
    and the first result is kept. Raises `UserError` for a bad tokenizer, text or `vocab_size`.
    """
    given, spec = None, f"byte-level BPE of {vocab_size} tokens"
    if tokenizer:
        from aoe_jax.data.tokenizer import load_tokenizer  # slow to import

        given = load_tokenizer(tokenizer)
        token_store.check_vocab_size(given.token_count, vocab_size)
        spec = given.sha256
    elif len(corpora) > 1:
        spec = [spec, [corpus.fingerprint for corpus in corpora]]
    directories = []
    for corpus in corpora:
        key = token_store.short_hash([token_store.FORMAT_VERSION, corpus.fingerprint, spec])
        directories.append(Path(cache, "tokens", f"{token_store.slug(corpus.name)}-{key}"))
    missing = [directory for directory in directories if not directory.exists()]
    for directory in set(directories) - set(missing):
        log.info(f"token store: using {directory}")
    if missing:
        from aoe_jax.data.building import build_token_stores  # slow to import

        stores = dict(zip(directories, corpora, strict=True))  # equal texts share a store
        build_token_stores(stores, given, vocab_size)
    return directories

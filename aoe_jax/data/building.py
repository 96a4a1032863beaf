"""Writes the shards and the manifest of token stores, and builds stores of corpora in a cache."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from aoe_jax.data import SPLITS, token_store
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, pieces, train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.storage.files import exclusive, new_folder, sync, write_json

logger = logging.getLogger(__name__)

RECORDS_PER_SHARD = 32768  # a shard has 256 MiB of uint16 tokens before compression
_BATCH_CHARACTERS = 2**21


@dataclass(frozen=True)
class Corpus:
    """A text corpus in three splits. `documents(split)` yields the non-empty documents of a split,
    always in the same order, and raises `UserError` if a document cannot be read.

    `fingerprint` changes when the text changes. But for a TFDS data set it depends only on the
    name, version, text field and sizes, so it stays the same if an edit keeps all of these.
    """

    name: str
    fingerprint: str
    documents: Callable[[str], Iterator[str]]


def write_splits(
    folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, suffix: str = ""
) -> dict[str, dict]:
    """Tokenises documents, and writes shards `SPLIT{suffix}-00000.array_record`, ... to `folder`.

    `documents` are pairs `(split, non-empty text)`. Returns for each split the number of `tokens`,
    `documents` and `bytes` of UTF-8, and a list `shards` with the `name`, `tokens`, `file_bytes`
    and `sha256` of each shard. All shards are synced to the disk. Raises `UserError` if the
    tokenizer encodes some text as its end-of-text token.
    """
    writers = {split: _SplitWriter(folder, split + suffix, tokenizer) for split in SPLITS}
    with contextlib.ExitStack() as files:
        for writer in writers.values():
            files.callback(writer.close)
        for split, text in documents:
            writers[split].add(text)
        return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    def __init__(self, folder: Path, prefix: str, tokenizer: Tokenizer):
        self._folder, self._prefix, self._tokenizer = folder, prefix, tokenizer
        self._dtype = _token_dtype(tokenizer)
        # Pieces of documents that are not tokenised yet; None marks the end of a document.
        self._pieces: list[str | None] = []
        self._characters = 0  # total length of `_pieces`
        self._rest = np.empty(0, self._dtype)  # tokens that do not fill a record yet
        self._shard = None  # the shard that is being written
        self._numbers = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}

    def add(self, text: str):
        for piece in pieces(text):
            self._pieces.append(piece)
            self._characters += len(piece)
            if self._characters >= _BATCH_CHARACTERS:
                self._tokenise()
        self._pieces.append(None)

    def finish(self) -> dict:
        self._tokenise()
        if len(self._rest):
            self._write(self._rest)
        self._finish_shard()
        return self._numbers

    def close(self):
        if self._shard:
            self._shard.close()

    def _tokenise(self):
        end_of_text = self._tokenizer.end_of_text
        texts = [piece for piece in self._pieces if piece is not None]
        encoded = self._tokenizer.encode(texts)
        if any(end_of_text in ids for ids in encoded):
            problem = "encodes some text as its end-of-text token; name another tokenizer"
            raise UserError(f"data.tokenizer: {problem}")
        in_order, end = iter(encoded), np.array([end_of_text], self._dtype)
        ids = [end if piece is None else next(in_order) for piece in self._pieces]
        tokens = np.concatenate([self._rest, *ids]).astype(self._dtype)
        whole = len(tokens) - len(tokens) % token_store.RECORD_TOKENS
        for start in range(0, whole, token_store.RECORD_TOKENS):
            self._write(tokens[start : start + token_store.RECORD_TOKENS])
        self._rest = tokens[whole:]
        self._numbers["documents"] += len(self._pieces) - len(texts)
        self._numbers["bytes"] += sum(len(text.encode()) for text in texts)
        self._pieces, self._characters = [], 0

    def _write(self, tokens: np.ndarray):
        shards = self._numbers["shards"]
        if not self._shard:
            name = f"{self._prefix}-{len(shards):05d}.array_record"
            self._shard = ArrayRecordWriter(str(self._folder / name), "group_size:1")
            shards.append({"name": name, "tokens": 0})
        self._shard.write(tokens.tobytes())
        shards[-1]["tokens"] += len(tokens)
        self._numbers["tokens"] += len(tokens)
        if shards[-1]["tokens"] == RECORDS_PER_SHARD * token_store.RECORD_TOKENS:
            self._finish_shard()

    def _finish_shard(self):
        if self._shard:
            self._shard.close()
            self._shard, numbers = None, self._numbers["shards"][-1]
            path = self._folder / numbers["name"]
            sync(path)
            numbers |= {"file_bytes": path.stat().st_size, "sha256": token_store.file_sha256(path)}


def write_manifest(
    directory: Path, corpus: str, fingerprint: str, tokenizer: Tokenizer, splits: Mapping[str, dict]
):
    """Writes `manifest.json`, which completes a store. `splits` is the result of `write_splits`."""
    manifest = {
        "format_version": token_store.FORMAT_VERSION,
        "corpus": corpus,
        "corpus_fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.token_count,
        "end_of_text": tokenizer.end_of_text,
        "dtype": _token_dtype(tokenizer).name,
        # 1 is added, because a stream begins with an end-of-text token that no shard stores.
        "splits": {name: split | {"tokens": 1 + split["tokens"]} for name, split in splits.items()},
    }
    write_json(directory / "manifest.json", manifest)


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.token_count <= 2**16 else np.uint32)


def cached_token_stores(
    corpora: list[Corpus], tokenizer: str | None, vocab_size: int, cache: Path
) -> list[Path]:
    """Returns the directory of each corpus's token store, after building the missing stores.

    `tokenizer` is the path of a file. If it is None, byte-level BPE with `vocab_size` tokens is
    trained on the train splits of all corpora. The folder of a store is `NAME-HASH` in
    `<cache>/tokens`. The hash depends on the text and the tokenizer, so a change of these makes a
    new store. If several processes share the cache, one builds a store and the others wait. On a
    network disk whose locks work only within a host, one process of every host builds the store,
    and the first result is kept. Raises `UserError` if the tokenizer or a text cannot be used, or
    `vocab_size` is too small.
    """
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        token_store.check_vocab_size(given.token_count, vocab_size)
    spec = given.sha256 if given else f"byte-level BPE of {vocab_size} tokens"
    if not given and len(corpora) > 1:
        spec = [spec, [corpus.fingerprint for corpus in corpora]]
    directories = []
    for corpus in corpora:
        key = token_store.short_hash([token_store.FORMAT_VERSION, corpus.fingerprint, spec])
        directories.append(Path(cache, "tokens", f"{token_store.slug(corpus.name)}-{key}"))
    for corpus, directory in zip(corpora, directories, strict=True):
        if directory.exists():
            logger.info(f"token store: using {directory}")
            continue
        with exclusive(directory.with_name(f".{directory.name}.lock")):
            if not directory.exists():
                started = time.monotonic()
                if not given and (built := [folder for folder in directories if folder.exists()]):
                    given = load_tokenizer(token_store.saved_tokenizer(built[0]))
                if not given:
                    texts = (text for corpus in corpora for text in corpus.documents("train"))
                    given = train_tokenizer(texts, vocab_size)
                build_token_store(corpus, given, directory)
                seconds = time.monotonic() - started
                logger.info(f"token store: built {directory} in {seconds:.1f} s")
    return directories


def build_token_store(corpus: Corpus, tokenizer: Tokenizer, directory: Path):
    """Tokenises a corpus into a temporary folder, and renames it to `directory` at the end.

    At most one process of a host may build `directory` at a time. Memory must have space for one
    batch of documents, and for the longest document. Raises `UserError` if a split has no
    documents, or the tokenizer encodes some text as its end-of-text token.
    """
    with new_folder(directory) as new:
        splits = write_splits(new, _documents(corpus), tokenizer)
        for split, numbers in splits.items():
            if numbers["documents"] == 0:
                found = f"its {split} split has no text; give a larger corpus"
                raise UserError(f"data.name={corpus.name!r}: {found}")
        tokenizer.save(new)
        write_manifest(new, corpus.name, corpus.fingerprint, tokenizer, splits)


def _documents(corpus: Corpus) -> Iterator[tuple[str, str]]:
    with tqdm(desc=f"tokenising {corpus.name}", unit="B", unit_scale=True, delay=5) as progress:
        for split in SPLITS:
            for text in corpus.documents(split):
                yield split, text
                progress.update(len(text))

"""Builds token stores: tokenises documents, and writes shards and the manifest."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from aoe_jax.data import SPLITS, token_store
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, pieces, train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.storage.files import exclusive, sync, write_json
from aoe_jax.storage.paths import new_folder

logger = logging.getLogger(__name__)

RECORDS_PER_SHARD = 32768  # a full shard has 256 MiB of uint16 tokens before compression
_BATCH_CHARACTERS = 2**21


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


def build_token_stores(stores: Mapping, tokenizer: Tokenizer | None, vocab_size: int):
    """Builds the stores `{directory: Corpus}` that do not exist, with one tokenizer: the given one,
    that of an existing store, or byte-level BPE that is trained on all train splits.
    """
    for directory, corpus in stores.items():
        with exclusive(directory.with_name(f".{directory.name}.lock")):
            if directory.exists():
                continue
            started = time.monotonic()
            if not tokenizer and (built := [folder for folder in stores if folder.exists()]):
                tokenizer = load_tokenizer(token_store.saved_tokenizer(built[0]))
            if not tokenizer:
                texts = (text for c in stores.values() for text in c.documents("train"))
                tokenizer = train_tokenizer(texts, vocab_size)
            build_token_store(corpus, tokenizer, directory)
            seconds = time.monotonic() - started
            logger.info(f"token store: built {directory} in {seconds:.1f} s")


def build_token_store(corpus, tokenizer: Tokenizer, directory: Path):
    """Tokenises a `Corpus` into a temporary folder, and renames it to `directory` at the end.

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


def _documents(corpus) -> Iterator[tuple[str, str]]:
    with tqdm(desc=f"tokenising {corpus.name}", unit="B", unit_scale=True, delay=5) as progress:
        for split in SPLITS:
            for text in corpus.documents(split):
                yield split, text
                progress.update(len(text))

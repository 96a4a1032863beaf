"""Token stores: a tokenised corpus on disk, written once and read by random access.

For each split a store holds one stream of tokens, `EOT doc1 EOT doc2 EOT ... docN EOT`. All tokens
but the first are in shards, ArrayRecord files of records of `RECORD_TOKENS` tokens, of which the
last one of a shard may be shorter. Beside them are the tokenizer's file and `manifest.json`.
"""

import contextlib
import functools
import hashlib
import os
import re
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from aoe_jax.data import SPLITS
from aoe_jax.data.tokenizer import Tokenizer, pieces, saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.storage.files import (
    COUNT,
    TEXT,
    exclusive,
    matching,
    one_of,
    partial_path,
    read_json,
    replace_durably,
    sync,
    write_json,
)
from aoe_jax.storage.paths import file_system, is_remote
from aoe_jax.storage.retry import is_fault, patiently

FORMAT_VERSION = 2
PLAN_FILE = "plan.json"  # only in a store of `aoe_jax.prepare`
RECORD_TOKENS = 4096
RECORDS_PER_SHARD = 32768  # 256 MiB of uint16 tokens before compression
_BATCH_CHARACTERS = 2**21
_SHARD = re.compile(rf"({'|'.join(SPLITS)})(-[0-9]{{5,9}}){{1,2}}\.array_record", re.ASCII)
_HASH = re.compile("[0-9a-f]{64}")
# The part that a manifest and the notes of a preparation have in common.
SPLITS_SCHEMA = {
    "tokens": COUNT,
    "documents": COUNT,
    "bytes": COUNT,
    "shards": [
        {
            "name": matching(_SHARD, "the name of a shard"),
            "tokens": COUNT,
            "file_bytes": COUNT,
            "sha256": matching(_HASH, "a hash"),
        }
    ],
}
_MANIFEST = {
    "format_version": one_of(FORMAT_VERSION),
    "corpus": TEXT,
    "corpus_fingerprint": TEXT,
    "tokenizer_sha256": TEXT,
    "vocab_size": COUNT,
    "end_of_text": COUNT,
    "dtype": one_of("uint16", "uint32"),
    "splits": dict.fromkeys(SPLITS, SPLITS_SCHEMA),
}
_MANIFEST_BYTES = 2**26


def write_splits(
    folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, suffix: str = ""
) -> dict[str, dict]:
    """Tokenises documents into shards `SPLIT{suffix}-00000.array_record` and so on in `folder`.

    `documents` are pairs of a split and a text that is not empty. Returns for each split the
    numbers of `tokens`, `documents` and `bytes` of UTF-8, and the `shards`, which are then safely
    on the disk: the `name`, `tokens`, `file_bytes` and `sha256` of each. Raises `UserError` if the
    tokenizer encodes a part of a text as its end-of-text token.
    """
    with contextlib.ExitStack() as files:
        writers = {}
        for split in SPLITS:
            writers[split] = _SplitWriter(folder, split + suffix, tokenizer)
            files.callback(writers[split].close)
        for split, text in documents:
            writers[split].add(text)
        return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    def __init__(self, folder: Path, prefix: str, tokenizer: Tokenizer):
        self._folder, self._prefix, self._tokenizer = folder, prefix, tokenizer
        self._dtype = _token_dtype(tokenizer)
        # Pieces of documents that are not tokenised yet; None is the end of a document.
        self._pieces: list[str | None] = []
        self._characters = 0  # in these
        self._rest = np.empty(0, self._dtype)  # tokens that fill no record yet
        self._shard = None  # the last shard, until it is finished
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
        if any((ids == end_of_text).any() for ids in encoded):
            raise UserError(
                "data.tokenizer: it encodes some text as its end-of-text token; name another "
                "tokenizer"
            )
        in_order, end = iter(encoded), np.array([end_of_text], self._dtype)
        ids = [end if piece is None else next(in_order) for piece in self._pieces]
        tokens = np.concatenate([self._rest, *ids]).astype(self._dtype)
        whole = len(tokens) - len(tokens) % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._write(tokens[start : start + RECORD_TOKENS])
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
        if shards[-1]["tokens"] == RECORDS_PER_SHARD * RECORD_TOKENS:
            self._finish_shard()

    def _finish_shard(self):
        if self._shard:
            self._shard.close()
            self._shard, numbers = None, self._numbers["shards"][-1]
            path = self._folder / numbers["name"]
            sync(path)
            numbers |= {"file_bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(
    directory: Path, corpus: str, fingerprint: str, tokenizer: Tokenizer, splits: Mapping[str, dict]
):
    """Writes `manifest.json`, which turns the shards in `directory` into a store. `fingerprint`
    changes when the corpus does, and `splits` is the result of `write_splits`.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus,
        "corpus_fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.token_count,
        "end_of_text": tokenizer.end_of_text,
        "dtype": _token_dtype(tokenizer).name,
        # The stream begins with an end-of-text token that is in no shard.
        "splits": {name: split | {"tokens": 1 + split["tokens"]} for name, split in splits.items()},
    }
    write_json(directory / "manifest.json", manifest)


def read_manifest(directory: Path) -> dict:
    """The manifest of a token store; raises `UserError` if it is missing, damaged or outdated."""
    path = directory / "manifest.json"
    if not path.exists():
        if not directory.is_dir():
            raise UserError(f"token store {str(directory)!r}: no such folder; correct the path")
        if (directory / PLAN_FILE).exists():
            raise UserError(
                f"token store {str(directory)!r}: it is not finished; repeat the command `python "
                "-m aoe_jax.prepare` that began it"
            )
        raise _damaged(directory, "manifest.json is missing")
    manifest = read_json(path, _cure(directory), _MANIFEST, _MANIFEST_BYTES)
    if not manifest["end_of_text"] < manifest["vocab_size"] <= 2**31:
        raise _damaged(directory, "manifest.json has an end-of-text token outside its vocabulary")
    for split, numbers in manifest["splits"].items():
        if numbers["tokens"] != 1 + sum(shard["tokens"] for shard in numbers["shards"]):
            raise _damaged(directory, f"manifest.json has other tokens in {split} than its shards")
    return manifest


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cure(directory: Path) -> str:
    if (directory / PLAN_FILE).exists():
        return "prepare it again with `python -m aoe_jax.prepare`, into a new folder"
    return "delete this folder to have it built again"


def _damaged(directory: Path, reason: str) -> UserError:
    return UserError(f"token store {str(directory)!r}: {reason}; {_cure(directory)}")


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.token_count <= 2**16 else np.uint32)


class TokenStore:
    """The "train", "validation" or "test" split of a token store.

    It has `documents` documents of `text_bytes` bytes in UTF-8, separated by token `end_of_text`.
    """

    def __init__(self, directory: str | Path, split: str, origin=None):
        """Opens a store on a disk.

        With `origin`, a store in an object store, `directory` is its `staged` folder, into which a
        shard is copied when it is first read. Raises `UserError` if the manifest or a shard is
        missing or damaged.
        """
        self._directory, self.split, self._origin = Path(directory), split, origin
        self._fetched = set()  # shards that are in the staged folder
        self.manifest = read_manifest(self._directory)
        self.end_of_text = self.manifest["end_of_text"]
        numbers = self.manifest["splits"][split]
        self.documents, self.text_bytes = numbers["documents"], numbers["bytes"]
        self._tokens, self._shards = numbers["tokens"], numbers["shards"]
        self._dtype = np.dtype(self.manifest["dtype"])
        # Index in the stream at which each shard begins, and at which the last one ends.
        self._starts = np.cumsum([1, *(shard["tokens"] for shard in self._shards)])
        place = origin or self._directory
        sizes = patiently(f"{place} cannot be read", lambda: _file_sizes(place))
        for shard in self._shards:
            name, wanted = shard["name"], shard["file_bytes"]
            if name not in sizes:
                raise _damaged(place, f"{name} is missing")
            if sizes[name] != wanted:
                raise _damaged(place, f"{name} has {sizes[name]} bytes instead of {wanted}")

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the stream, int32 `[stop - start]`. Raises `IndexError` if the
        range is empty or reaches beyond the stream, `UserError` if a shard is damaged there.
        """
        if not 0 <= start < stop <= self._tokens:
            raise IndexError(f"tokens {start}:{stop} of a stream of {self._tokens}")
        pieces = [np.array([self.end_of_text], self._dtype)] if start == 0 else []
        at = max(start, 1)
        shard = int(np.searchsorted(self._starts, at, "right")) - 1
        while at < stop:
            begin, end = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            pieces.append(self._read_shard(shard, at - begin, end - begin))
            at, shard = end, shard + 1
        return np.concatenate(pieces).astype(np.int32)

    def _read_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        path = self._directory / self._shards[shard]["name"]
        if self._origin and shard not in self._fetched:
            self._fetch(self._shards[shard], path)
            self._fetched.add(shard)
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        read = functools.partial(self._records, path, first, last + 1)
        content = b"".join(patiently(f"{path} cannot be read", read))
        tokens = np.frombuffer(content, self._dtype, len(content) // self._dtype.itemsize)
        tokens = tokens[start - first * RECORD_TOKENS : stop - first * RECORD_TOKENS]
        if len(tokens) < stop - start or tokens.max() >= self.manifest["vocab_size"]:
            raise _damaged(path.parent, f"{path.name} has other tokens than manifest.json says")
        return tokens

    def _records(self, path: Path, first: int, stop: int) -> list[bytes]:
        try:
            return _reader(self, str(path)).read(first, stop)
        except Exception as error:  # array_record raises RuntimeError and others
            _reader.cache_clear()  # a reader that failed once may go on failing
            if is_fault(error):
                raise
            raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from error

    def _fetch(self, shard: dict, path: Path):
        source = os.fspath(self._origin / shard["name"])
        with exclusive(path.with_name(f".{path.name}.lock")):
            if path.exists() and path.stat().st_size == shard["file_bytes"]:
                return
            partial = partial_path(path)
            copy = functools.partial(file_system(source).get_file, source, str(partial))
            try:
                patiently(f"{source} cannot be copied to {path.parent}", copy)
            except FileNotFoundError as e:
                raise _damaged(self._origin, f"{shard['name']} is missing") from e
            if file_sha256(partial) != shard["sha256"]:
                raise _damaged(self._origin, f"{shard['name']} has another hash than it should")
            replace_durably(partial, path)


def staged(origin, cache: str) -> Path:
    """The folder in `cache` for a token store in an object store, with all but its shards. Raises
    `UserError` if there is no complete store.
    """
    manifest = read_manifest(origin)
    key = hashlib.sha256(repr(manifest).encode()).hexdigest()[:16]
    folder = Path(cache, "staged", f"{origin.name}-{key}")
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "manifest.json").exists():
            folder.mkdir(exist_ok=True)
            tokenizer = saved_tokenizer(origin)
            (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
            sync(folder / tokenizer.name)
            write_json(folder / "manifest.json", manifest)
    return folder


def _file_sizes(directory) -> dict[str, int]:
    if not is_remote(directory):
        entries = filter(os.DirEntry.is_file, os.scandir(directory))
        return {entry.name: entry.stat().st_size for entry in entries}
    files = file_system(directory).ls(os.fspath(directory), detail=True)
    return {file["name"].rpartition("/")[2]: file["size"] for file in files}


@functools.lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
def _reader(store: TokenStore, path: str) -> ArrayRecordReader:
    """An open shard of a store; the least recently used ones are closed."""
    reader = ArrayRecordReader(path)
    if not reader.ok():  # it would seem to have no records
        reader.close()  # raises what is wrong
    return reader

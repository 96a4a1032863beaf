"""Token stores: a tokenised corpus on disk, written once and read by random access.

For each split a store has a stream of tokens, `EOT doc1 EOT ... docN EOT`; EOT is the end-of-text
token. Shards, which are ArrayRecord files, store all tokens except the first. A record has
`RECORD_TOKENS` tokens, or fewer at the end of a shard. A store also has a tokenizer and a manifest.
"""

import functools
import hashlib
import json
import re
import resource
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from aoe_jax.config.checks import require
from aoe_jax.data import SPLITS
from aoe_jax.errors import UserError
from aoe_jax.storage.files import COUNT, TEXT, matching, one_of, read_json
from aoe_jax.storage.paths import size_and_version
from aoe_jax.storage.retry import is_fault, patiently

FORMAT_VERSION = 2
PLAN_FILE = "plan.json"  # only stores that `aoe_jax.prepare` makes have this file
RECORD_TOKENS = 4096
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # Hugging Face, SentencePiece
SHARD = re.compile(rf"({'|'.join(SPLITS)})(-[0-9]{{5,9}}){{1,2}}\.array_record", re.ASCII)
_HASH = re.compile("[0-9a-f]{64}")
# The schema of one split in a manifest, and in the notes that `preparation.py` writes.
SPLITS_SCHEMA = {
    "tokens": COUNT,
    "documents": COUNT,
    "bytes": COUNT,
    "shards": [
        {
            "name": matching(SHARD, "the name of a shard"),
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


def read_manifest(directory: Path) -> dict:
    """Reads a manifest. Raises `UserError` if it is missing, damaged or in another format."""
    path = directory / "manifest.json"
    if not path.exists():
        missing = "manifest.json is missing" if directory.exists() else "there is no such folder"
        wanted = (
            f"{missing}; correct config.data.path or --output, make a store with "
            "`python -m aoe_jax.prepare`, or delete this folder if it is in data.cache"
        )
        if (directory / PLAN_FILE).exists():
            wanted = "it is not finished; repeat the `python -m aoe_jax.prepare` that began it"
        raise UserError(f"token store {str(directory)!r}: {wanted}")
    manifest = read_json(path, _cure(directory), _MANIFEST, _MANIFEST_BYTES)
    if not manifest["end_of_text"] < manifest["vocab_size"] <= 2**31:
        raise _damaged(directory, "manifest.json has an end-of-text token outside its vocabulary")
    for split, numbers in manifest["splits"].items():
        if numbers["tokens"] != 1 + sum(shard["tokens"] for shard in numbers["shards"]):
            raise _damaged(directory, f"manifest.json has a wrong number of {split} tokens")
        # A document has at least one byte of text and an end-of-text token.
        n_documents, most = numbers["documents"], min(numbers["bytes"], numbers["tokens"] - 1)
        if not 0 < n_documents <= most:
            found = f"{n_documents} documents, {numbers['bytes']} bytes, {numbers['tokens']} tokens"
            raise _damaged(directory, f"manifest.json has {found} in {split}")
    return manifest


def saved_tokenizer(folder: Path) -> Path:
    """Returns the path of the tokenizer's file in a folder; if none exists, `tokenizer.json`."""
    files = [folder / name for name in TOKENIZER_FILES]
    return next((file for file in files if file.is_file()), files[0])


def check_vocab_size(token_count: int, vocab_size: int):
    """Raises `UserError` if `vocab_size` is smaller than `token_count`."""
    wanted = f"the tokenizer has {token_count} tokens; it must be at least that"
    require(vocab_size >= token_count, "model.vocab_size", vocab_size, wanted)


def short_hash(value: list) -> str:
    """The first 64 bits of the SHA-256 of a value as JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """Replaces characters of a corpus's name by dashes, so that it can be part of a file name."""
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-")


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


class TokenStore:
    """The "train", "validation" or "test" split of a token store.

    Its `documents` documents have `text_bytes` bytes in total; `end_of_text` tokens separate them.
    """

    def __init__(self, directory: str | Path, split: str):
        """Opens a split of a store on a disk. Raises `UserError` if the manifest is missing or
        damaged, or if a shard is missing or has a wrong size.
        """
        self._directory, self.split = Path(directory), split
        self.manifest = read_manifest(self._directory)
        self.end_of_text = self.manifest["end_of_text"]
        numbers = self.manifest["splits"][split]
        self.documents, self.text_bytes = numbers["documents"], numbers["bytes"]
        self._tokens, self._shards = numbers["tokens"], numbers["shards"]
        self._dtype = np.dtype(self.manifest["dtype"])
        # Positions in the stream where the shards begin, then the length of the stream.
        self._starts = np.cumsum([1, *(shard["tokens"] for shard in self._shards)])
        for shard in self._shards:
            path, wanted = self._directory / shard["name"], shard["file_bytes"]
            what = f"{path} cannot be read"
            try:
                size, _ = patiently(what, functools.partial(size_and_version, path))
            except FileNotFoundError as e:
                raise _damaged(self._directory, f"{path.name} is missing") from e
            if size != wanted:
                raise _damaged(self._directory, f"{path.name} has {size} bytes instead of {wanted}")

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads tokens `[start, stop)` of the stream as int32 `[stop - start]`. Raises `IndexError`
        if the range is empty or exceeds the stream, and `UserError` if a shard is damaged there.
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
            _reader.cache_clear()  # the next try opens a new reader: this one may fail again
            if is_fault(error):
                raise
            raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from error


@functools.lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
def _reader(store: TokenStore, path: str) -> ArrayRecordReader:
    """An open shard of a store. The cache closes the least recently used shards."""
    reader = ArrayRecordReader(path)
    if not reader.ok():  # without this check, a damaged shard would seem to be empty
        reader.close()  # raises an exception with the reason
    return reader

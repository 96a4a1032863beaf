"""Token stores: a tokenised corpus on disk, read by random access.

For each split a store holds one stream of tokens, `EOT doc1 EOT doc2 EOT ... docN EOT`. All but the
first token lie in shards, ArrayRecord files of records of `RECORD_TOKENS` tokens, the last one of a
shard shorter. Beside them are the tokenizer's file and `manifest.json`.
"""

import functools
import os
import resource
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from aoe_jax.data.manifest import damaged, read_manifest
from aoe_jax.data.store_writer import RECORD_TOKENS
from aoe_jax.errors import UserError


class TokenStore:
    """One split of a token store; made by `open_token_store`.

    Attributes:
        manifest: the store's manifest, as a dictionary.
        end_of_text: id of the token that separates documents.
        documents: number of documents in the split.
        text_bytes: length of the split's documents in UTF-8, for bits per byte.
    """

    def __init__(self, directory: Path, manifest: dict, split: str):
        """Open the shards of a split; raise `UserError` as `open_token_store` does."""
        self.manifest = manifest
        self.end_of_text = manifest["end_of_text"]
        self.documents = manifest["splits"][split]["documents"]
        self.text_bytes = manifest["splits"][split]["bytes"]
        self.split = split
        self._tokens = manifest["splits"][split]["tokens"]
        self._dtype = np.dtype(manifest["dtype"])
        self._directory, self._shards = directory, manifest["splits"][split]["shards"]
        # Where each shard begins in the stream, and where the last one ends.
        self._starts = np.cumsum([1, *(shard["tokens"] for shard in self._shards)])
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
        for shard in self._shards:
            if shard["name"] not in sizes:
                raise damaged(directory, f"{shard['name']} is missing")
            if shard["file_bytes"] != sizes[shard["name"]]:
                raise damaged(
                    directory,
                    f"{shard['name']} has {sizes[shard['name']]} bytes instead of {shard['file_bytes']}",
                )

    def __len__(self) -> int:
        """Number of tokens in the stream."""
        return self._tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the stream, int32 `[stop - start]`.

        Raises:
            IndexError: the range is empty or reaches beyond the stream.
            UserError: a shard is damaged there.
        """
        if not 0 <= start < stop <= self._tokens:
            raise IndexError(f"tokens {start}:{stop} of a stream of {self._tokens}")
        pieces = [np.array([self.end_of_text], self._dtype)] if start == 0 else []
        at, shard = max(start, 1), int(np.searchsorted(self._starts, max(start, 1), "right")) - 1
        while at < stop:
            begins, end = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            if at < end:
                first, last = (at - begins) // RECORD_TOKENS, (end - begins - 1) // RECORD_TOKENS
                records = b"".join(self._records(shard, first, last + 1))
                begins += first * RECORD_TOKENS
                pieces.append(np.frombuffer(records, self._dtype)[at - begins : end - begins])
            at, shard = end, shard + 1
        return np.concatenate(pieces).astype(np.int32)

    def _records(self, shard: int, first: int, stop: int) -> list[bytes]:
        path = self._directory / self._shards[shard]["name"]
        try:
            return _reader(self, str(path)).read(first, stop)
        except Exception as error:  # array_record raises RuntimeError and others
            if "Too many open files" in str(error):
                raise UserError(
                    f"{path}: too many files are open; raise the limit (ulimit -n)"
                ) from error
            raise damaged(path.parent, f"{path.name} cannot be read ({error})") from error


@functools.lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
def _reader(store: TokenStore, path: str) -> ArrayRecordReader:
    """An open shard of a store; those that were used least lately are closed."""
    return ArrayRecordReader(path)


def open_token_store(directory: str | Path, split: str) -> TokenStore:
    """Open the "train", "validation" or "test" split of a token store.

    Raises:
        UserError: the manifest or a shard is missing or damaged.
    """
    directory = Path(directory)
    return TokenStore(directory, read_manifest(directory), split)

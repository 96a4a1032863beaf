"""Token stores: a tokenised corpus on disk, read by random access.

For each split a store holds one stream of tokens, `EOT doc1 EOT doc2 EOT ... docN EOT`. All but the first token lie in
shards, ArrayRecord files of records of `RECORD_TOKENS` tokens, the last one of a shard shorter. Beside them are the
tokenizer's file and `manifest.json`.
"""

from pathlib import Path

import grain
import numpy as np

from aoe_jax.data.manifest import damaged, read_manifest
from aoe_jax.data.store_writer import RECORD_TOKENS


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
        shards = manifest["splits"][split]["shards"]
        self._shards = [directory / shard["name"] for shard in shards]
        counts = [shard["tokens"] for shard in shards]
        records = [-(-count // RECORD_TOKENS) for count in counts]
        self._starts = np.cumsum([1, *counts])  # where each shard begins in the stream, and where the last one ends
        self._first_records = np.cumsum([0, *records])
        for shard in self._shards:
            if not shard.is_file():
                raise damaged(directory, f"{shard.name} is missing")
        try:
            self._records = grain.sources.ArrayRecordDataSource(self._shards)
        except Exception as error:  # array_record raises several types for a file that it cannot read
            raise damaged(directory, f"the {split} shards cannot be read") from error
        if len(self._records) != sum(records):
            raise damaged(directory, f"the {split} shards hold another number of records than manifest.json says")

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
                records = b"".join(self._record(shard, record) for record in range(first, last + 1))
                begins += first * RECORD_TOKENS
                pieces.append(np.frombuffer(records, self._dtype)[at - begins : end - begins])
            at, shard = end, shard + 1
        return np.concatenate(pieces).astype(np.int32)

    def _record(self, shard: int, record: int) -> bytes:
        try:
            return self._records[int(self._first_records[shard]) + record]
        except Exception as error:  # array_record raises RuntimeError and others
            path = self._shards[shard]
            raise damaged(path.parent, f"{path.name} cannot be read ({error})") from error


def open_token_store(directory: str | Path, split: str) -> TokenStore:
    """Open the "train", "validation" or "test" split of a token store.

    Raises:
        UserError: the manifest or a shard is missing or damaged.
    """
    directory = Path(directory)
    return TokenStore(directory, read_manifest(directory), split)

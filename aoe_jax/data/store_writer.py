"""Writing token stores; `token_store.py` reads them and says what they are."""

import hashlib
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from aoe_jax.data.manifest import token_dtype
from aoe_jax.data.tokenizer import Tokenizer
from aoe_jax.errors import UserError
from aoe_jax.json_files import sync

RECORD_TOKENS = 4096
_BATCH_CHARACTERS = 2**21
RECORDS_PER_SHARD = 32768  # 256 MiB of uint16 tokens before compression


class SplitWriter:
    """Tokenises documents of one split into the shards `<prefix>-00000.array_record`,
    `<prefix>-00001.array_record`, ...

    Use it in a `with` statement: what goes wrong within leaves unfinished files behind, but none
    open.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        tokenizer: Tokenizer,
        records_per_shard: int = RECORDS_PER_SHARD,
    ):
        """Nothing is written before the first document."""
        self._folder, self._prefix, self._tokenizer = folder, prefix, tokenizer
        self._records_per_shard = records_per_shard
        self._dtype = token_dtype(tokenizer)
        self._texts: list[str] = []  # not tokenised yet
        self._characters = 0
        self._pending = np.empty(0, self._dtype)  # less than a record
        self._writer, self._records = None, 0  # of the shard that is being written
        self._shards: list[dict] = []
        self._documents = self._bytes = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception):
        if self._writer:
            self._writer.close()

    def add(self, text: str):
        """Append a document, which must not be empty; a few million characters are tokenised at a
        time.

        Raises:
            UserError: the tokenizer finds its end-of-text token within a document.
        """
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._tokenise()

    def finish(self) -> dict:
        """Write what is left: the numbers of `tokens`, `documents` and `bytes` of UTF-8, and the
        `shards`.

        A shard has a `name`, a number of `tokens`, and the size, `file_bytes`, and the `sha256` of
        its file, which is on the disk by now. Raises what `add` does.
        """
        self._tokenise()
        if len(self._pending):
            self._write(self._pending)
        self._finish_shard()
        return {
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": self._documents,
            "bytes": self._bytes,
            "shards": self._shards,
        }

    def _tokenise(self):
        texts, self._texts, self._characters = self._texts, [], 0
        if not texts:
            return
        end_of_text = np.array([self._tokenizer.end_of_text], self._dtype)
        tokens = np.concatenate(
            [
                piece
                for ids in self._tokenizer.encode(texts)
                for piece in (ids.astype(self._dtype), end_of_text)
            ]
        )
        if np.count_nonzero(tokens == end_of_text) != len(texts):
            raise UserError(
                "data.tokenizer: it gives its end-of-text token for text too; name a tokenizer that doesn't"
            )
        tokens = np.concatenate([self._pending, tokens])
        whole = len(tokens) - len(tokens) % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._write(tokens[start : start + RECORD_TOKENS])
        self._pending = tokens[whole:]
        self._documents += len(texts)
        self._bytes += sum(len(text.encode()) for text in texts)

    def _write(self, tokens: np.ndarray):
        if self._records == self._records_per_shard:
            self._finish_shard()
        if self._writer is None:
            name = f"{self._prefix}-{len(self._shards):05d}.array_record"
            self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1")
            self._shards.append({"name": name, "tokens": 0})
        self._writer.write(tokens.tobytes())
        self._records += 1
        self._shards[-1]["tokens"] += len(tokens)

    def _finish_shard(self):
        if self._writer:
            self._writer.close()
            path = self._folder / self._shards[-1]["name"]
            sync(path)
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self._shards[-1] |= {"file_bytes": path.stat().st_size, "sha256": sha256}
        self._writer, self._records = None, 0

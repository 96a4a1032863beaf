"""Token stores: a tokenised corpus on disk, read by random access.

For each split a store holds one stream of tokens, `EOT doc1 EOT doc2 EOT ... docN EOT`, cut into ArrayRecord records of
`RECORD_TOKENS` tokens (the last one shorter), beside `tokenizer.json` and a `manifest.json`.
"""

import hashlib
import itertools
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer
from tqdm import tqdm

from aoe_jax.data.corpora import SPLITS, Corpus, slug
from aoe_jax.data.locking import exclusive
from aoe_jax.data.tokenizer import check_vocab_size, end_of_text_id, load_tokenizer, token_count, train_tokenizer
from aoe_jax.errors import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RECORD_TOKENS = 4096
RECORDS_PER_SHARD = 32768  # 256 MiB of uint16 tokens before compression
_BATCH_CHARACTERS = 2**22


class TokenStore:
    """One split of a token store; made by `open_token_store`.

    Attributes:
        manifest: the store's manifest, as a dictionary.
        end_of_text: id of the token that separates documents.
        documents: number of documents in the split.
        text_bytes: length of the split's documents in UTF-8, for bits per byte.
    """

    def __init__(self, manifest: dict, split: str, records: grain.sources.RandomAccessDataSource, shards: list[Path]):
        """Wrap the records of a split, which lie in these shards."""
        self.manifest = manifest
        self.end_of_text = manifest["end_of_text"]
        self.documents = manifest["splits"][split]["documents"]
        self.text_bytes = manifest["splits"][split]["bytes"]
        self.split = split
        self._tokens = manifest["splits"][split]["tokens"]
        self._dtype = np.dtype(manifest["dtype"])
        self._records = records
        self._shards = shards

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
        first = start // RECORD_TOKENS
        records = [self._record(index) for index in range(first, (stop - 1) // RECORD_TOKENS + 1)]
        offset = first * RECORD_TOKENS
        return np.frombuffer(b"".join(records), self._dtype)[start - offset : stop - offset].astype(np.int32)

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except Exception as error:  # array_record raises RuntimeError and others
            shard = _shard_of(self._shards, index)
            raise _damaged(shard.parent, f"{shard.name} cannot be read ({error})") from error


def prepare(corpora: list[Corpus], tokenizer: str | None, vocab_size: int, cache: str) -> list[Path]:
    """Directories of the corpora's token stores, built if they are not there yet.

    Another tokenizer, vocabulary size or text makes another store, named `<cache>/tokens/<corpus name>-<hash of the corpus
    and the tokenizer>`. Without `tokenizer`, the path of a tokenizer.json, byte-level BPE of `vocab_size` tokens is trained
    on the train splits of all corpora. Processes that share the cache build a store once, the others wait.

    Raises:
        UserError: a setting names no usable tokenizer, a text cannot be read, or `vocab_size` is too small.
    """
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        check_vocab_size(given, vocab_size)
        end_of_text_id(given)
    spec = tokenizer_sha256(given) if given else f"byte-level BPE of {vocab_size} tokens"
    if not given and len(corpora) > 1:
        spec = [spec, [corpus.fingerprint for corpus in corpora]]
    directories = [_directory(corpus, spec, cache) for corpus in corpora]
    if all(directory.exists() for directory in directories):
        logger.info("token store: using %s", ", ".join(map(str, directories)))
        return directories
    lock = directories[0] if len(corpora) == 1 else directories[0].with_name(f"several-{_short_hash(spec)}")
    with exclusive(lock.with_name(f".{lock.name}.lock")):
        for corpus, directory in zip(corpora, directories, strict=True):
            if directory.exists():
                continue
            for killed in directory.parent.glob(f"{directory.name}.partial-*"):
                shutil.rmtree(killed, ignore_errors=True)
            started = time.monotonic()
            if not given:
                texts = itertools.chain.from_iterable(corpus.documents("train") for corpus in corpora)
                given = train_tokenizer(texts, vocab_size)
            build_token_store(corpus, given, directory)
            logger.info("token store: built %s in %.1f s", directory, time.monotonic() - started)
    return directories


def _directory(corpus: Corpus, tokenizer_spec: str | list, cache: str) -> Path:
    key = _short_hash([FORMAT_VERSION, corpus.fingerprint, tokenizer_spec])
    return Path(cache, "tokens", f"{slug(corpus.name)}-{key}")


def _short_hash(value: str | list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def build_token_store(
    corpus: Corpus, tokenizer: Tokenizer, directory: str | Path, records_per_shard: int = RECORDS_PER_SHARD
) -> None:
    """Tokenise a corpus into `directory`, which comes into being only when it is complete.

    Memory is bounded by a batch of documents or the longest document. If another process completes `directory` first,
    its store stays and this one is dropped.

    Raises:
        UserError: a split has no documents, or the tokenizer has no end-of-text token.
    """
    directory = Path(directory)
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _write_store(corpus, tokenizer, partial, records_per_shard)
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_token_store(directory: str | Path, split: str) -> TokenStore:
    """Open the "train", "validation" or "test" split of a token store.

    Raises:
        UserError: the manifest or a shard is missing or damaged.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    shards = [directory / name for name in manifest["splits"][split]["shards"]]
    for shard in shards:
        if not shard.is_file():
            raise _damaged(directory, f"{shard.name} is missing")
    try:
        records = grain.sources.ArrayRecordDataSource(shards)
    except Exception as error:  # array_record raises several types for a file that it cannot read
        raise _damaged(directory, f"the {split} shards cannot be read") from error
    if len(records) != -(-manifest["splits"][split]["tokens"] // RECORD_TOKENS):
        raise _damaged(directory, f"the {split} shards hold another number of records than manifest.json says")
    return TokenStore(manifest, split, records, shards)


def _write_store(corpus: Corpus, tokenizer: Tokenizer, directory: Path, records_per_shard: int) -> None:
    dtype = np.dtype(np.uint16 if token_count(tokenizer) <= 2**16 else np.uint32)
    splits = {}
    for split in SPLITS:
        stream = _TokenStream(corpus.documents(split), tokenizer, f"tokenising {corpus.name} {split}")
        shards = _write_shards(_records(stream, dtype), directory, split, records_per_shard)
        if stream.documents == 0:
            raise UserError(f"data.name={corpus.name!r}: its {split} split has no text; give a larger corpus")
        splits[split] = {
            "tokens": stream.tokens,
            "documents": stream.documents,
            "bytes": stream.bytes,
            "shards": shards,
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "vocab_size": token_count(tokenizer),
        "end_of_text": end_of_text_id(tokenizer),
        "dtype": dtype.name,
        "splits": splits,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


class _TokenStream:
    """Iterates once over the tokens of the documents, in arrays, and counts what went by."""

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, label: str):
        self._texts = documents
        self._tokenizer = tokenizer
        self._label = label
        self.tokens = self.documents = self.bytes = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        end_of_text = end_of_text_id(self._tokenizer)
        yield self._count(np.array([end_of_text]))
        with tqdm(desc=self._label, unit="B", unit_scale=True, delay=5) as progress:
            for batch in _batches(self._texts):
                for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    yield self._count(np.array([*encoding.ids, end_of_text]))
                batch_bytes = sum(len(text.encode()) for text in batch)
                self.documents += len(batch)
                self.bytes += batch_bytes
                progress.update(batch_bytes)

    def _count(self, tokens: np.ndarray) -> np.ndarray:
        self.tokens += len(tokens)
        return tokens


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts up to about `_BATCH_CHARACTERS`, which bounds memory."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _records(stream: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[bytes]:
    """Cut a stream of token arrays into records of `RECORD_TOKENS` tokens, the last one shorter."""
    pending, count = [], 0
    for tokens in stream:
        pending.append(tokens.astype(dtype))
        count += len(tokens)
        if count >= RECORD_TOKENS:
            joined = np.concatenate(pending)
            whole = count - count % RECORD_TOKENS
            for start in range(0, whole, RECORD_TOKENS):
                yield joined[start : start + RECORD_TOKENS].tobytes()
            pending, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(pending).tobytes()


def _write_shards(records: Iterator[bytes], directory: Path, split: str, records_per_shard: int) -> list[str]:
    """Write the records into numbered shards and return their names."""
    names = []
    for record in records:
        names.append(f"{split}-{len(names):05d}.array_record")
        writer = ArrayRecordWriter(str(directory / names[-1]), "group_size:1")
        for item in itertools.chain([record], itertools.islice(records, records_per_shard - 1)):
            writer.write(item)
        writer.close()
    return names


def _read_manifest(directory: Path) -> dict:
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise _damaged(directory, "manifest.json is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, "manifest.json is damaged") from error
    if version != FORMAT_VERSION:
        raise _damaged(directory, f"manifest.json has format version {version}, not {FORMAT_VERSION}")
    return manifest


def _shard_of(shards: list[Path], index: int) -> Path:
    """The shard that holds a record."""
    for shard in shards[:-1]:
        count = ArrayRecordReader(str(shard)).num_records()
        if index < count:
            return shard
        index -= count
    return shards[-1]


def _damaged(directory: Path, reason: str) -> UserError:
    return UserError(f"token store {str(directory)!r}: {reason}; delete this folder to have it built again")


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """What tells tokenizers apart."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

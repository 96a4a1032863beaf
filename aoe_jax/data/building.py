"""Building the token stores of corpora, each once."""

import hashlib
import itertools
import json
import logging
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from aoe_jax.data import SPLITS
from aoe_jax.data.corpora import Corpus, slug
from aoe_jax.data.manifest import FORMAT_VERSION, write_manifest
from aoe_jax.data.store_writer import RECORDS_PER_SHARD, SplitWriter
from aoe_jax.data.tokenizer import (
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    saved_tokenizer,
    train_tokenizer,
)
from aoe_jax.errors import UserError
from aoe_jax.locking import exclusive

logger = logging.getLogger(__name__)


def cached_token_stores(
    corpora: list[Corpus], tokenizer: str | None, vocab_size: int, cache: str
) -> list[Path]:
    """Directories of the corpora's token stores, built if they are not there yet.

    Another tokenizer, vocabulary size or text makes another store, named `<cache>/tokens/<corpus
    name>-<hash of the corpus and the tokenizer>`. Without `tokenizer`, the path of a tokenizer's
    file, byte-level BPE of `vocab_size` tokens is trained on the train splits of all corpora.
    Processes that share the cache build a store once, the others wait.

    Raises:
        UserError: a setting names no usable tokenizer, a text cannot be read, or `vocab_size` is
          too small.
    """
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        check_vocab_size(given, vocab_size)
    spec = given.sha256 if given else f"byte-level BPE of {vocab_size} tokens"
    if not given and len(corpora) > 1:
        spec = [spec, [corpus.fingerprint for corpus in corpora]]
    directories = [_directory(corpus, spec, cache) for corpus in corpora]
    if all(directory.exists() for directory in directories):
        logger.info("token store: using %s", ", ".join(map(str, directories)))
        return directories
    for corpus, directory in zip(corpora, directories, strict=True):
        with exclusive(directory.with_name(f".{directory.name}.lock")):
            if not directory.exists():
                started = time.monotonic()
                if not given:
                    texts = itertools.chain.from_iterable(
                        corpus.documents("train") for corpus in corpora
                    )
                    given = train_tokenizer(texts, vocab_size)
                build_token_store(corpus, given, directory)
                logger.info(
                    "token store: built %s in %.1f s", directory, time.monotonic() - started
                )
        given = given or load_tokenizer(saved_tokenizer(directory))
    return directories


def _directory(corpus: Corpus, tokenizer_spec: str | list, cache: str) -> Path:
    key = _short_hash([FORMAT_VERSION, corpus.fingerprint, tokenizer_spec])
    return Path(cache, "tokens", f"{slug(corpus.name)}-{key}")


def _short_hash(value: str | list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def build_token_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: str | Path,
    records_per_shard: int = RECORDS_PER_SHARD,
) -> None:
    """Tokenise a corpus into `directory`, which comes into being only when it is complete; by one
    process at a time.

    Memory is bounded by a batch of documents or the longest document.

    Raises:
        UserError: a split has no documents, or `SplitWriter.add` refuses one.
    """
    directory = Path(directory)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_store(corpus, tokenizer, partial, records_per_shard)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_store(
    corpus: Corpus, tokenizer: Tokenizer, directory: Path, records_per_shard: int
) -> None:
    splits = {}
    for split in SPLITS:
        label = f"tokenising {corpus.name} {split}"
        with (
            SplitWriter(directory, split, tokenizer, records_per_shard) as writer,
            tqdm(desc=label, unit="B", unit_scale=True, delay=5) as progress,
        ):
            for text in corpus.documents(split):
                writer.add(text)
                progress.update(len(text))
            splits[split] = writer.finish()
        if splits[split]["documents"] == 0:
            raise UserError(
                f"data.name={corpus.name!r}: its {split} split has no text; give a larger corpus"
            )
    tokenizer.save(directory)
    write_manifest(directory, corpus.name, corpus.fingerprint, tokenizer, splits)

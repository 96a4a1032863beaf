"""Writes documents to files of every format, and reads documents from token stores."""

import gzip
import importlib.resources
import itertools
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet

from aoe_jax.data.corpora import Corpus
from aoe_jax.data.token_store import TokenStore

# The file with the 32,000 pieces of the Llama family.
LLAMA = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
WORDS = ["the", "state", "of", "the", "Union", "größe", "你好", "🚀", "naïve", "1790"]
SPACED = ["war\n", "peace\t", "  law", "\r\n"]


def texts(count, seed=0, longest=60):
    """Returns different documents of up to `longest` words."""
    choice = random.Random(seed)
    return [
        f"{seed}-{i}: " + " ".join(choice.choices(WORDS + SPACED, k=choice.randint(1, longest)))
        for i in range(count)
    ]


def json_lines(documents, field="text", end="\n"):
    """Returns one JSON object per line; every second line has escapes."""
    lines = [
        json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate(documents)
    ]
    return (end.join(lines) + end).encode()


def write_json_lines(path, documents, **how):
    path.write_bytes(json_lines(documents, **how))


def zstd(content):
    """Compresses to one frame."""
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write_gzip(path, documents, **how):
    """Writes two members, like `cat a.gz b.gz`."""
    content = json_lines(documents, **how)
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))


def write_zstd(path, documents, **how):
    """Writes two frames."""
    content = json_lines(documents, **how)
    path.write_bytes(zstd(content[:1000]) + zstd(content[1000:]))


def write_parquet(path, documents, field="text", group=7):
    """Writes row groups of a few rows."""
    table = pyarrow.table({"id": list(range(len(documents))), field: documents})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def write_everything(folder):
    """Writes all formats into a folder and its subfolders; returns the documents in order."""
    (folder / "sub").mkdir(parents=True)
    parts = [texts(count, seed) for seed, count in enumerate((300, 200, 150, 120, 3))]
    write_json_lines(folder / "a.jsonl", parts[0])
    write_zstd(folder / "b.jsonl.zst", parts[1])
    write_gzip(folder / "c.json.gz", parts[2])
    write_parquet(folder / "d.parquet", parts[3])
    for i, text in enumerate(parts[4]):
        (folder / "sub" / f"{i}.txt").write_bytes(text.encode())
    return [text for part in parts for text in part]


def corpus_of(*documents):
    """A corpus with the same documents in each split."""
    return Corpus("documents", "1", lambda split: iter(documents))


def stored_documents(directory, split):
    """Token lists of a store's documents; the stream must begin and end with end-of-text tokens."""
    store = TokenStore(directory, split)
    stream = store.read(0, len(store))
    ends = np.flatnonzero(stream == store.end_of_text)
    assert ends[0] == 0 and ends[-1] == len(stream) - 1 and len(ends) == store.documents + 1
    return [stream[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]

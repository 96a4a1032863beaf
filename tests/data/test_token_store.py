import json
import logging
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from aoe_jax.data import SPLITS, building
from aoe_jax.data.building import build_token_store
from aoe_jax.data.corpora import Corpus, load_corpus
from aoe_jax.data.token_store import RECORD_TOKENS, TokenStore
from aoe_jax.data.tokenised import cached_token_stores
from aoe_jax.data.tokenizer import HuggingFaceTokenizer, load_tokenizer, train_tokenizer
from aoe_jax.errors import UserError
from tests import runs
from tests.data.texts import stored_documents

VOCAB_SIZE = 300


@pytest.mark.parametrize("split", SPLITS)
def test_decoded_stream_is_the_text(sotu_cache, sotu_directory, split):
    tokenizer = load_tokenizer(sotu_directory / "tokenizer.json")
    texts = list(load_corpus("sotu", None, str(sotu_cache)).documents(split))
    assert list(map(tokenizer.decode, stored_documents(sotu_directory, split))) == texts
    store = TokenStore(sotu_directory, split)
    assert store.documents == len(texts)
    assert store.documents == {"train": 225, "validation": 12, "test": 12}[split]
    assert store.text_bytes == sum(len(text.encode()) for text in texts)
    assert store.manifest["corpus"] == "sotu" and store.manifest["dtype"] == "uint16"
    assert store.manifest["vocab_size"] == 300


def test_reads_cross_records_and_shards(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "RECORDS_PER_SHARD", 1)
    corpus = load_corpus("text", str(text_folder), str(tmp_path))
    tokenizer = train_tokenizer([], 257)
    build_token_store(corpus, tokenizer, tmp_path / "store")
    store = TokenStore(tmp_path / "store", "train")
    assert len(store.manifest["splits"]["train"]["shards"]) == -(-len(store) // RECORD_TOKENS) > 8
    expected = [0]
    for text in corpus.documents("train"):
        expected += [*tokenizer.encode([text])[0].tolist(), 0]
    end = len(store)
    for start, stop in [(0, end), (4095, 4097), (4096, 8192), (100, 20000), (end - 1, end)]:
        tokens = store.read(start, stop)
        assert tokens.dtype == np.int32 and tokens.tolist() == expected[start:stop]
    for start, stop in [(-1, 5), (5, 5), (0, len(store) + 1)]:
        with pytest.raises(IndexError):
            store.read(start, stop)


def test_batching_does_not_change_the_stream(text_folder, tmp_path, monkeypatch):
    whole = stored_documents(prepare_text(text_folder, tmp_path / "a"), "train")
    monkeypatch.setattr(building, "_BATCH_CHARACTERS", 100)
    assert stored_documents(prepare_text(text_folder, tmp_path / "b"), "train") == whole


def prepare_text(folder, cache, tokenizer=None):
    corpus = load_corpus("text", str(folder), str(cache))
    (directory,) = cached_token_stores(
        [corpus], tokenizer and str(tokenizer), VOCAB_SIZE, str(cache)
    )
    return directory


def test_a_store_is_used_again_for_the_same_text_and_tokenizer(text_folder, tmp_path, caplog):
    directory = prepare_text(text_folder, tmp_path)
    written = (directory / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="aoe_jax"):
        assert prepare_text(text_folder, tmp_path) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == written
    assert "using" in caplog.text and "built" not in caplog.text
    stores = {directory, prepare_text(text_folder, tmp_path, directory / "tokenizer.json")}
    other = tmp_path / "other.json"  # the same tokenizer, written in another way
    other.write_text(json.dumps(json.loads((directory / "tokenizer.json").read_text())))
    stores.add(store := prepare_text(text_folder, tmp_path, other))
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == load_tokenizer(other).sha256
    (text_folder / "00.txt").write_text("changed")
    stores.add(prepare_text(text_folder, tmp_path))
    assert len(stores) == 4 and all(store.name.startswith("text-") for store in stores)


def test_large_vocabulary_is_stored_in_32_bits(text_folder, tmp_path):
    vocabulary = {chr(i): i for i in range(0x7F)} | {"</s>": 70000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = HuggingFaceTokenizer(tokenizer.to_str())
    build_token_store(
        load_corpus("text", str(text_folder), str(tmp_path)), tokenizer, tmp_path / "store"
    )
    store = TokenStore(tmp_path / "store", "train")
    assert store.manifest["dtype"] == "uint32" and store.read(0, 1).tolist() == [70000]


PREPARE = """
import logging, sys
from aoe_jax.data import building, corpora, tokenised
{before}
logging.basicConfig(level=logging.INFO, force=True)
corpus = corpora.load_corpus("text", sys.argv[1], sys.argv[2])
print(*tokenised.cached_token_stores([corpus], None, 300, sys.argv[2]))
"""

DIE_IN_THE_LAST_SPLIT = """
import dataclasses, os, signal
building._BATCH_CHARACTERS = 100  # so that texts reach the disk at once
load = corpora.load_corpus
def load_one_that_dies(*arguments):
    corpus = load(*arguments)
    def documents(split):
        for text in corpus.documents(split):
            yield text
            if split == "test":
                os.kill(os.getpid(), signal.SIGKILL)
    return dataclasses.replace(corpus, documents=documents)
corpora.load_corpus = load_one_that_dies
"""


def start_prepare(folder, cache, before=""):
    return runs.start(["-c", PREPARE.format(before=before), str(folder), str(cache)])


def test_killed_build_leaves_no_store_and_is_cleaned_up(text_folder, tmp_path):
    cache = tmp_path / "cache"
    killed = start_prepare(text_folder, cache, before=DIE_IN_THE_LAST_SPLIT)
    killed.communicate()
    assert killed.returncode == -9
    (left,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    assert ".partial-" in left.name and any(left.glob("train-*.array_record"))
    directory = prepare_text(text_folder, cache)
    assert [path for path in (cache / "tokens").iterdir() if path.is_dir()] == [directory]
    assert len(stored_documents(directory, "train")) > 30


def test_processes_that_prepare_at_once_build_one_store(text_folder, tmp_path):
    processes = [start_prepare(text_folder, tmp_path) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({stdout for stdout, _ in outputs}) == 1
    assert sum("token store: built" in stderr for _, stderr in outputs) == 1
    assert len([path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]) == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} " * 50)
    return prepare_text(folder, folder / "cache")


SHARD = "test-00000.array_record"
FEW = {"splits.test.tokens": 10**6, "splits.test.shards.0.tokens": 10**6 - 1}
DAMAGES = [  # (content of a shard, fields of the manifest or its text, words of the message)
    (bytes(100), {}, rf"{SHARD} has 100 bytes instead of \d+"),
    (0, {}, rf"{SHARD} cannot be read"),
    (None, {}, rf"{SHARD} is missing"),
    ("whole", {"format_version": 0}, r"cannot be read: format_version is 0, not one of \[2\]"),
    ("whole", {"dtype": "O"}, "manifest.json cannot be read: dtype is 'O', not one of"),
    ("whole", {"end_of_text": 10**6}, "has an end-of-text token outside its vocabulary"),
    ("whole", {"vocab_size": 2}, "has other tokens than manifest.json says"),
    ("whole", {"splits.test.tokens": 10**6}, "has a wrong number of test tokens"),
    ("whole", {"splits.test.bytes": 0}, r"has \d+ documents, 0 bytes, \d+ tokens in test"),
    ("whole", {"splits.test.documents": 10**6}, "has 1000000 documents, "),
    ("whole", FEW, f"{SHARD} cannot be read"),
    ("whole", {"splits.test.shards.0.name": f"../{SHARD}"}, f"is '../{SHARD}', not the name of a"),
    ("whole", "{", "manifest.json cannot be read"),
    ("whole", None, "manifest.json is missing"),
]


@pytest.mark.parametrize(("shard", "manifest", "words"), DAMAGES)
def test_damaged_stores(built, tmp_path, shard, manifest, words):
    directory = shutil.copytree(built, tmp_path / "store")
    path, file = directory / SHARD, directory / "manifest.json"
    if shard is None:
        path.unlink()
    elif shard != "whole":
        path.write_bytes(shard or bytes(path.stat().st_size))
    if isinstance(manifest, dict):
        values = json.loads(file.read_text())
        for name, value in manifest.items():
            *parents, field = name.split(".")
            place = values
            for parent in parents:
                place = place[int(parent) if parent.isdigit() else parent]
            place[field] = value
        manifest = json.dumps(values)
    file.write_text(manifest) if manifest else file.unlink()
    with pytest.raises(UserError, match=rf"store'?.*{words}.*delete this folder"):
        store = TokenStore(directory, "test")
        store.read(0, len(store))


def test_few_files_are_open_at_a_time(tmp_path):
    """If there are more shards than a process may open, it closes some of them again."""
    code = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from aoe_jax.data import building, token_store
from aoe_jax.data.tokenizer import train_tokenizer
from tests.data.texts import corpus_of
building.RECORDS_PER_SHARD = 1
corpus, folder = corpus_of(*["word " * 1000] * 250), Path(sys.argv[1])
building.build_token_store(corpus, train_tokenizer([], 257), folder)
store = token_store.TokenStore(folder, "train")
assert len(list(folder.glob("train*"))) > 250
for _ in range(2):
    for start in range(0, len(store) - 10, 4096):
        store.read(start, start + 10)
"""
    runs.succeed(["-c", code, str(tmp_path / "store")])


def test_setting_mistakes(text_folder, tmp_path):
    texts = [path.read_bytes().decode() for path in text_folder.rglob("*.txt")]
    train_tokenizer(texts, 320).save(tmp_path)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "no-eot.json"))
    for name, words in (
        ("tokenizer.json", r"model.vocab_size=300: the tokenizer has 3\d\d tokens"),
        ("none.json", r"data.tokenizer='.*none.json': cannot be read \(No such file"),
        ("no-eot.json", r"data.tokenizer='.*no-eot.json': has no end-of-text token"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_text(text_folder, tmp_path, tmp_path / name)
    for name in ("00.txt", "long.txt"):
        (text_folder / name).write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"\.txt is not UTF-8 at byte 0"):
        prepare_text(text_folder, tmp_path)
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]


def test_split_without_text(tmp_path):
    corpus = Corpus("no_test", "1", lambda split: ["some text"] if split != "test" else [])
    with pytest.raises(UserError, match=r"data.name='no_test': its test split has no text"):
        build_token_store(corpus, train_tokenizer([], 257), tmp_path / "tokens" / "store")
    assert not any((tmp_path / "tokens").iterdir())

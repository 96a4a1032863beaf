"""Random mutations of files that a stranger may have made. Every reader succeeds or raises
`UserError`, and nothing is written outside the folder of the files.
"""

import contextlib
import copy
import json
import os
import random
import sys
from pathlib import Path
from unittest import mock

import pytest

from aoe_jax.compare.train_runs import read_summary
from aoe_jax.data.documents import documents, pieces_of
from aoe_jax.data.preparation import Settings, prepare
from aoe_jax.data.token_store import TokenStore
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import source_config
from aoe_jax.formats import tensor_files
from aoe_jax.formats.configs import as_own, to_json
from aoe_jax.formats.loading import RUN_FILE, ModelReader, read_begin_token, read_config, read_step
from aoe_jax.formats.tensor_files import INDEX, SINGLE, stored_tensors
from aoe_jax.formats.tokenizer_files import read_prefix
from aoe_jax.formats.writing import parameters_of, write_model
from aoe_jax.storage.files import read_metrics, write_json
from aoe_jax.training.run_folder import RunFolder, check_config, check_data
from tests.data.texts import write_everything
from tests.evaluation.models import make_config, make_model

DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = [
    *(None, True, False, 0, 1, -1, 7, 255, 2**31, -(2**31), 2**32, 2**63, 2**64),
    *(10**400, -(10**400)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "x" * 5000, "\0", "\ud800", "é好🚀", "nan", "1", "../../x", "/etc/passwd", "%s{}"),
    *("float32", "top_k", "dense", "mixtral", "text", "uint16", "train", "~", "<|endoftext|>"),
    *([], {}, [[]], [None], {"": {}}, {"x": 1}, [0] * 300, {"type": "x"}, DEEP),
    # Parts of tokenizers.
    *(
        {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0], ["</s>", -1e308]]},
        {"type": "Unigram", "unk_id": 0, "vocab": []},
        {"type": "WordPiece", "unk_token": "", "vocab": {"a": 0}, "max_input_chars_per_word": 0},
        {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"</s>": 4294967295}},
        {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 7}, "merges": [["a", "b"]]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Removed", "invert": False},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": []},
        {"type": "Strip", "content": " ", "start": 2**63, "stop": 1},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    ),
]


def write_models(folder: Path):
    """Writes a model in one file in the format of `aoe_jax.export`, and a Mixtral in shards."""
    changes = {"experts__n_experts": 2, "model__n_layers": 1, "data__seq_len": 16}
    for name, kind in (("aoe", "aoe"), ("mixtral", "router")):
        config = make_config(experts__kind=kind, **changes)
        model, directory = make_model(config), folder / name
        directory.mkdir()
        values = (as_own if kind == "aoe" else to_json)(config)
        limit = tensor_files.SHARD_BYTES if kind == "aoe" else 20_000
        with mock.patch.object(tensor_files, "SHARD_BYTES", limit):
            write_model(directory, values | {"bos_token_id": 0}, *parameters_of(model.params))
        model.tokenizer.save(directory)
        write_json(directory / "tokenizer_config.json", {"add_bos_token": True})
    write_json(folder / "aoe" / RUN_FILE, {"step": 7, "config": make_config(**changes).to_dict()})


def read_model(directory: Path):
    config = source_config(directory)
    ModelReader(directory, config)
    read_begin_token(directory, config.model.vocab_size)


def read_tensors(directory: Path):
    for tensor in stored_tensors(directory).values():
        tensor.read([slice(None)] * len(tensor.shape))


def read_tokenizer(file: Path):
    tokenizer = load_tokenizer(file)
    for ids in tokenizer.encode(["the state\n of it", "好🚀<|endoftext|></s>", "", " a" * 50]):
        tokenizer.decode(ids[:1000])
    read_prefix(file.parent, tokenizer, 0)


def read_store(directory: Path):
    for split in ("train", "validation", "test"):
        store = TokenStore(directory, split)
        store.read(0, len(store))


def read_documents(file: Path):
    for piece, _ in pieces_of(file, file.stat().st_size, 3000):
        for _ in documents(piece, "text"):
            pass


def make_files(folder: Path):
    """Makes all files; returns a configuration, its corpora and a function that makes a store."""
    write_models(folder)
    texts, store, workdir = (folder / name for name in ("texts", "store", "run"))
    write_everything(texts)
    inputs = [str(texts / "sub" / "*.txt"), str(texts / "a.jsonl")]
    settings = Settings("bpe:300", validation=0.2, test=0.2)
    prepare(inputs, settings, store, 1)
    config = make_config(data__name="prepared", data__path=str(store))
    corpus = open_corpus(config.data, config.model.vocab_size)
    workdir.mkdir()
    RunFolder(workdir).claim(config, corpus)
    lines = [{"step": 7, "loss": 1.5, "nll": None, "layers": {"load": [1.0]}}] * 9
    lines += [{"step": 9, "validation_nll": 1.25}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(workdir / "summary.json", {"metrics": {"step": 9}, "memory": {"state_bytes": 4}})
    return config, corpus, lambda: prepare(inputs, settings, store, 1)


# Path of a file -> function that reads it; its arguments are the path and `make_files`' result.
READERS = {
    "aoe/config.json": lambda file, made: read_model(file.parent),
    "mixtral/config.json": lambda file, made: read_model(file.parent),
    f"aoe/{RUN_FILE}": lambda file, made: (read_config(file.parent), read_step(file.parent)),
    f"aoe/{SINGLE}": lambda file, made: read_tensors(file.parent),
    "mixtral/model-00001-of-*.safetensors": lambda file, made: read_tensors(file.parent),
    f"mixtral/{INDEX}": lambda file, made: read_tensors(file.parent),
    "aoe/tokenizer.json": lambda file, made: read_tokenizer(file),
    "run/config.json": lambda file, made: check_config(file.parent, made[0]),
    "run/data.json": lambda file, made: check_data(file.parent, made[1]),
    "run/metrics.jsonl": lambda file, made: list(read_metrics(file)),
    "run/summary.json": lambda file, made: read_summary(file),
    "store/manifest.json": lambda file, made: read_store(file.parent),
    "store/plan.json": lambda file, made: made[2](),
    "texts/a.jsonl": lambda file, made: read_documents(file),
    "texts/c.json.gz": lambda file, made: read_documents(file),
    "texts/d.parquet": lambda file, made: read_documents(file),
}


def mutated(content: bytes, choice: random.Random) -> bytes:
    """Makes one to three random changes, either to JSON in the content or to its bytes."""
    head, tail = b"", b""
    if content[8:10] == b'{"':  # safetensors
        size = int.from_bytes(content[:8], "little")
        head, content, tail = content[:8], content[8 : 8 + size], content[8 + size :]
    try:
        if choice.random() < 0.3:
            raise ValueError
        if b"}\n{" in content:
            lines = content.splitlines(keepends=True)
            at = choice.randrange(len(lines))
            lines[at] = _changed_json(lines[at], choice) + b"\n"
            content = b"".join(lines)
        else:
            content = _changed_json(content, choice)
    except ValueError:
        content = _changed_bytes(content, choice)
    if head and choice.random() < 0.8:
        head = len(content).to_bytes(8, "little")
    return head + content + tail


def _changed_json(content, choice):
    value = json.loads(content)
    for _ in range(choice.choice([1, 1, 1, 2, 3])):
        places = [(parent, key) for parent in _containers(value) for key in _keys(parent)]
        if not places:
            break
        parent, key = choice.choice(places)
        what = choice.random()
        if what < 0.15:
            del parent[key]
        elif what < 0.25:
            other, other_key = choice.choice(places)
            parent[key] = copy.copy(other[other_key])
        elif what < 0.3 and isinstance(parent, dict):
            parent[choice.choice([v for v in VALUES if isinstance(v, str)])] = parent.pop(key)
        else:
            parent[key] = choice.choice(VALUES)
    return json.dumps(value).encode()


def _containers(value, depth=0):
    if isinstance(value, dict | list) and depth < 20:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part, depth + 1)


def _keys(parent):
    # Without this limit, nearly all changes would be in long lists, such as merges.
    return list(parent)[:40] if isinstance(parent, dict) else range(min(len(parent), 10))


def _changed_bytes(content, choice):
    content = bytearray(content)
    for _ in range(choice.choice([1, 1, 2, 8])):
        at = choice.randrange(len(content) + 1)
        what = choice.randrange(5)
        if what == 0:
            content[at : at + 1] = bytes([choice.randrange(256)])
        elif what == 1:
            del content[at : at + choice.choice([1, 10, 1000])]
        elif what == 2:
            runs = [b"\0", b"\xff\xfe", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000]
            content[at:at] = choice.choice(runs)
        elif what == 3:
            content[at:at] = content[at : at + choice.choice([1, 10, 1000])]
        else:
            del content[at:]
    return bytes(content)


class Watch:
    """Records all writes outside a folder while it is active."""

    def __init__(self, folder: Path):
        self._folder, self.active, self.found = str(folder), False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        is_write = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
        if event == "open":
            is_write = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.active and is_write and not isinstance(arguments[0], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path != os.devnull and not path.startswith(self._folder):
                self.found.append((event, path))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the folder of the files, the result of `make_files`, and a `Watch`."""
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, make_files(folder), Watch(folder)


@contextlib.contextmanager
def replaced(file: Path, content: bytes):
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", READERS)
def test_readers_succeed_or_name_the_mistake(files, name):
    folder, made, watch = files
    choice, refused, (file,) = random.Random(name), 0, folder.glob(name)
    whole = file.read_bytes()
    for _ in range(25):
        content = mutated(whole, choice)
        with replaced(file, content):
            watch.active = True
            try:
                READERS[name](file, made)
            except UserError as error:
                refused += 1
                message = str(error)
                assert len(message.splitlines()) <= 2 and len(message) < 10_000, message
            except BaseException as error:
                error.add_note(f"the content was {content[:3000]!r}")
                raise
            finally:
                watch.active = False
    assert not watch.found
    # The reader of metrics skips invalid lines instead of raising an exception.
    assert (refused > 0) == (name != "run/metrics.jsonl")


SIZES = ("vocab_size", "num_hidden_layers", "num_local_experts", "intermediate_size", "hidden_size")


@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_the_tensors_lack_take_no_memory(files, field):
    file = files[0] / "mixtral/config.json"
    values = json.loads(file.read_text()) | {"head_dim": None, field: 2**30}
    with replaced(file, json.dumps(values).encode()), pytest.raises(UserError):
        read_model(file.parent)

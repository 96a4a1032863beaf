"""Files that somebody else may have made, mutated at random: every reader succeeds or raises
`UserError`, and nothing is written outside the folder of the files.
"""

import copy
import dataclasses
import functools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

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
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        255,
        2**31,
        -(2**31),
        2**32,
        2**63,
        2**64,
        10**400,
        -(10**400),
    ),
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


@dataclasses.dataclass
class Target:
    """A file, and what reads it."""

    file: Path
    read: Callable[[], object]


def write_models(folder: Path):
    """A model in one file, as `aoe_jax.export` writes it, and a Mixtral in shards."""
    changes = {"experts__n_experts": 2, "model__n_layers": 1, "data__seq_len": 16}
    for name, kind in (("aoe", "aoe"), ("mixtral", "router")):
        config = make_config(experts__kind=kind, **changes)
        model, directory = make_model(config), folder / name
        directory.mkdir()
        limit = tensor_files.SHARD_BYTES
        tensor_files.SHARD_BYTES = limit if kind == "aoe" else 20_000
        try:
            values = (as_own if kind == "aoe" else to_json)(config)
            write_model(directory, values | {"bos_token_id": 0}, *parameters_of(model.params))
        finally:
            tensor_files.SHARD_BYTES = limit
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


def read_lines(workdir: Path):
    for _ in read_metrics(workdir / "metrics.jsonl"):
        pass


def read_documents(file: Path):
    for piece, _ in pieces_of(file, file.stat().st_size, 3000):
        for _ in documents(piece, "text"):
            pass


def make_targets(folder: Path):
    """Every file with its reader, by name, in a folder of their own."""
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
    aoe, mixtral = folder / "aoe", folder / "mixtral"
    shard = next(mixtral.glob("*.safetensors"))
    targets = {
        "config.json of a model": (aoe / "config.json", read_model, aoe),
        "config.json of the hub": (mixtral / "config.json", read_model, mixtral),
        "aoe_jax.json": (aoe / RUN_FILE, lambda path: (read_config(path), read_step(path)), aoe),
        "safetensors": (aoe / SINGLE, read_tensors, aoe),
        "shard of safetensors": (shard, read_tensors, mixtral),
        "index": (mixtral / INDEX, read_tensors, mixtral),
        "tokenizer.json": (aoe / "tokenizer.json", read_tokenizer),
        "config.json of a run": (workdir / "config.json", check_config, workdir, config),
        "data.json": (workdir / "data.json", check_data, workdir, corpus),
        "metrics.jsonl": (workdir / "metrics.jsonl", read_lines, workdir),
        "summary.json": (workdir / "summary.json", read_summary),
        "manifest.json": (store / "manifest.json", read_store, store),
        "plan.json": (store / "plan.json", prepare, inputs, settings, store, 1),
        "JSON lines": (texts / "a.jsonl", read_documents),
        "gzip": (texts / "c.json.gz", read_documents),
        "Parquet": (texts / "d.parquet", read_documents),
    }
    return {
        name: Target(file, functools.partial(read, *(arguments or [file])))
        for name, (file, read, *arguments) in targets.items()
    }


def mutated(content: bytes, choice: random.Random) -> bytes:
    """The content with one to three changes: of JSON in it, or of its bytes."""
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
    # Long lists, such as merges, would have nearly all changes.
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
    """Notes what is written outside a folder, while it is active."""

    def __init__(self, folder: Path):
        self._folder, self.active, self.found = str(folder), False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"):
            return
        path = arguments[0]
        if isinstance(path, int) or path == os.devnull:
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(self._folder):
            self.found.append((event, path))


def try_mutations(target: Target, watch: Watch, choice: random.Random, count: int):
    """Reads a file after each of so many mutations; returns how many were refused."""
    whole, refused = target.file.read_bytes(), 0
    for number in range(count):
        content = mutated(whole, choice)
        target.file.write_bytes(content)
        watch.active = True
        try:
            target.read()
        except UserError as error:
            refused += 1
            message = str(error)
            assert len(message.splitlines()) <= 2 and len(message) < 10_000, message
        except BaseException as error:
            error.add_note(f"mutation {number} of {target.file.name}: {content[:3000]!r}")
            raise
        finally:
            watch.active = False
            target.file.write_bytes(whole)
    assert not watch.found
    return refused


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return make_targets(folder), Watch(folder)


COUNT = 25  # mutations of each file
NAMES = (
    "config.json of a model",
    "config.json of the hub",
    "aoe_jax.json",
    "safetensors",
    "shard of safetensors",
    "index",
    "tokenizer.json",
    "config.json of a run",
    "data.json",
    "metrics.jsonl",
    "summary.json",
    "manifest.json",
    "plan.json",
    "JSON lines",
    "gzip",
    "Parquet",
)


@pytest.mark.parametrize("name", NAMES)
def test_readers_succeed_or_name_the_mistake(targets, name):
    by_name, watch = targets
    assert by_name.keys() == {*NAMES}
    refused = try_mutations(by_name[name], watch, random.Random(name), COUNT)
    # Lines of metrics that cannot be read are left out.
    assert (refused > 0) == (name != "metrics.jsonl")


SIZES = ("vocab_size", "num_hidden_layers", "num_local_experts", "intermediate_size", "hidden_size")


@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_the_tensors_lack_take_no_memory(targets, field):
    target = targets[0]["config.json of the hub"]
    whole = target.file.read_text()
    values = json.loads(whole) | {"head_dim": None}
    write_json(target.file, values | {field: 2**30})
    try:
        with pytest.raises(UserError):
            target.read()
    finally:
        target.file.write_text(whole)

"""Token stores made from files: their content is the same after any interruption."""

import dataclasses
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import types
from concurrent.futures import as_completed

import pytest

from aoe_jax.config.data import DataConfig
from aoe_jax.data import SPLITS, plan_file, preparation
from aoe_jax.data.preparation import Settings, check, prepare
from aoe_jax.data.token_store import TokenStore, saved_tokenizer
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import MachineFault, Preempted, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import write_json
from tests.data.texts import LLAMA, json_lines, stored_documents, texts, write_everything
from tests.runs import contents, damage

SETTINGS = Settings("bpe:300", validation=0.1, test=0.05)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Reduces the size of a unit of work, so that these inputs have several units."""
    monkeypatch.setattr(plan_file, "_UNIT_BYTES", (4000, 8000))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Writes files; returns `(glob pattern, documents in order)`."""
    folder = tmp_path_factory.mktemp("files") / "in"
    return str(folder / "**"), write_everything(folder)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A token store that two processes made without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_file, "_UNIT_BYTES", (4000, 8000))
        return prepared(inputs, tmp_path_factory.mktemp("stores") / "store", processes=2)


def prepared(inputs, output, settings=SETTINGS, processes=1):
    prepare([inputs[0]], settings, output, processes)
    return output


def stored(directory, split):
    """The documents of a split, decoded."""
    tokenizer = load_tokenizer(saved_tokenizer(directory))
    return list(map(tokenizer.decode, stored_documents(directory, split)))


def files_of(store):
    """Returns the files that must be equal in all stores of the same documents."""
    return {name: content for name, content in contents(store).items() if name != "plan.json"}


def test_every_document_is_there_once_and_in_order(inputs, whole, monkeypatch):
    found = {split: stored(whole, split) for split in SPLITS}
    places = {text: place for place, text in enumerate(inputs[1])}
    order = {split: [places[text] for text in texts] for split, texts in found.items()}
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert sorted(itertools.chain(*order.values())) == list(range(len(places)))
    assert 0.05 < len(found["validation"]) / len(places) < 0.15
    assert 0.02 < len(found["test"]) / len(places) < 0.09
    manifest = TokenStore(whole, "train").manifest
    for split in SPLITS:
        numbers = manifest["splits"][split]
        assert numbers["documents"] == len(found[split])
        assert numbers["bytes"] == sum(len(text.encode()) for text in found[split])
        assert numbers["tokens"] == 1 + sum(shard["tokens"] for shard in numbers["shards"])
    assert len(manifest["splits"]["train"]["shards"]) > 5
    assert manifest["tokenizer_sha256"] == load_tokenizer(whole / "tokenizer.json").sha256
    learnt_from = preparation._sample(plan_file.read_plan(whole))
    assert set(learnt_from) <= set(found["train"])
    monkeypatch.setattr(preparation, "_SAMPLE_CHARACTERS", 1)
    assert len([*preparation._sample(plan_file.read_plan(whole))]) > 5  # one of each unit
    assert manifest["vocab_size"] == 300 and manifest["corpus"] == "store"
    others = {path.name for path in whole.iterdir() if path.suffix != ".array_record"}
    assert others == {"manifest.json", "plan.json", "tokenizer.json"}


def test_processes_and_a_tokenizer_of_a_file_change_nothing(inputs, whole, tmp_path):
    given = shutil.copyfile(whole / "tokenizer.json", tmp_path / "given.json")
    settings = Settings(str(given), validation=0.1, test=0.05)
    assert files_of(prepared(inputs, tmp_path / "3" / "store", processes=3)) == files_of(whole)
    assert files_of(prepared(inputs, tmp_path / "store", settings)) == files_of(whole)


def test_documents_that_come_twice_are_in_one_split(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(300)))
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts(300)[::-1]))
    store = prepared((str(tmp_path / "*.jsonl"), None), tmp_path / "store")
    for split in SPLITS:
        found = stored(store, split)
        assert sorted(found[: len(found) // 2]) == sorted(found[len(found) // 2 :])


def interrupted(inputs, output, monkeypatch, when):
    """Prepares a store, and calls `when(units written)`, which may raise, after each unit."""

    def watched(futures):
        when(0)
        for future in as_completed(futures):
            when(len(list((output / "units").glob("*.json"))))
            yield future

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "as_completed", watched)
        prepared(inputs, output, processes=2)


def stop(error):
    raise error("stopped")


@pytest.mark.parametrize(("units", "error"), [(0, Preempted), (4, Preempted), (4, UserError)])
def test_stopped_preparation_goes_on(inputs, whole, tmp_path, monkeypatch, caplog, units, error):
    """A missing permission, for example, is a `UserError`; it may be given again."""
    output = tmp_path / "store"
    with pytest.raises(error):
        interrupted(inputs, output, monkeypatch, lambda n: n >= units and stop(error))
    for use in (check, lambda store: TokenStore(store, "train")):
        words = r"store': it is not finished; repeat the `python -m aoe_jax.prepare` that"
        with pytest.raises(UserError, match=words):
            use(output)
    if units:  # the shards of a unit are on the disk before its note
        done = []
        with monkeypatch.context() as patch:
            note = lambda file, value: done.append(file.name) or write_json(file, value)  # noqa: E731
            patch.setattr(preparation, "write_json", note)
            patch.setattr(preparation, "sync", lambda folder: done.append(folder.name))
            preparation.write_unit(output, 0)
        assert done == ["store", "00000.json"]
    (output / "units" / "00003.partial-1").mkdir(exist_ok=True)
    caplog.set_level("INFO", "aoe_jax")
    assert files_of(prepared(inputs, output)) == files_of(whole)
    assert ("going on: " in caplog.text) == (units > 0)


def test_a_mistake_removes_no_file_of_the_user(inputs, tmp_path, monkeypatch):
    for error in (Preempted, UserError):
        with pytest.raises(error):
            interrupted(inputs, tmp_path / "store", monkeypatch, lambda n: stop(error))
        for name in ("mine.array_record", "tokenizer.md"):
            (tmp_path / "store" / name).touch()
    assert {*os.listdir(tmp_path / "store")} == {"mine.array_record", "tokenizer.md"}


def test_killed_process_is_a_fault_and_the_preparation_goes_on(
    inputs, whole, tmp_path, monkeypatch
):
    def kill(written):
        if children := multiprocessing.active_children():
            children[0].kill()

    with pytest.raises(MachineFault, match="--processes=2: a process was killed; if memory ran"):
        interrupted(inputs, tmp_path / "store", monkeypatch, kill)
    assert files_of(prepared(inputs, tmp_path / "store")) == files_of(whole)


def test_complete_store_is_left_alone(inputs, whole, caplog):
    """Other settings are refused."""
    before = contents(whole)
    caplog.set_level("INFO", "aoe_jax")
    prepared(inputs, whole)
    assert "is complete already" in caplog.text
    for changes, message in (
        ({"tokenizer": "bpe:301"}, r"tokenizer is 'bpe:300' there, 'bpe:301' here"),
        ({"validation": 0.2}, r"validation is 0\.1 there, 0\.2 here"),
    ):
        words = rf"holds a preparation of something else: {message}\. Delete the folder, or"
        with pytest.raises(UserError, match=words):
            prepared(inputs, whole, dataclasses.replace(SETTINGS, **changes))
    assert contents(whole) == before


def test_input_that_changes_is_refused(inputs, tmp_path):
    folder = shutil.copytree(inputs[0].removesuffix("**"), tmp_path / "in")
    pattern = str(folder / "**"), None
    store = prepared(pattern, folder / "store")  # its own files are no input
    before = contents(store)

    def refuses(name):
        words = rf"--input: .*{name} is new, gone or changed since the preparation began\."
        with pytest.raises(UserError, match=words):
            prepared(pattern, store)

    (folder / "new.txt").write_text("new")
    refuses("new.txt")
    (folder / "new.txt").unlink()
    (folder / "sub" / "2.txt").write_bytes((folder / "sub" / "2.txt").read_bytes()[::-1])
    refuses("2.txt")  # of the same size
    shutil.copy2(inputs[0].replace("**", "sub/2.txt"), folder / "sub")
    (folder / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes() + b'{"text": "more"}\n')
    refuses("a.jsonl")
    (folder / "a.jsonl").unlink()
    refuses("a.jsonl")
    assert contents(store) == before


def test_other_folders_are_refused(inputs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(UserError, match=r"other: is not empty, and holds no preparation"):
        prepared(inputs, tmp_path / "other")
    with pytest.raises(UserError, match=r"mine is a file or a broken link; name"):
        prepared(inputs, tmp_path / "other" / "mine")
    assert os.listdir(tmp_path / "other") == ["mine"]


@pytest.mark.parametrize("harm", [damage, os.unlink, lambda path: os.truncate(path, 100)])
def test_damaged_shards_are_found(whole, tmp_path, harm):
    store = shutil.copytree(whole, tmp_path / "store")
    assert check(store) == []
    names = ["train-00002-00000.array_record", "validation-00000-00000.array_record"]
    for name in names:
        harm(store / name)
    assert sorted(check(store)) == names
    if harm is not damage:
        words = r"train-00002-00000.* (is missing|has 100 bytes).*; prepare it again with .*, into"
        with pytest.raises(UserError, match=words):
            TokenStore(store, "train")
    (store / "tokenizer.json").write_bytes((store / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer of this store"):
        check(store)


def test_sentencepiece_model(inputs, tmp_path):
    store = prepared(inputs, tmp_path / "store", Settings(str(LLAMA), validation=0.1, test=0.05))
    assert (store / "tokenizer.model").read_bytes() == LLAMA.read_bytes()
    expected = set(inputs[1])
    assert sum(len(stored(store, split)) for split in SPLITS) == len(expected)
    assert set(stored(store, "train")) < expected
    manifest = TokenStore(store, "train").manifest
    assert manifest["vocab_size"] == 32000 and manifest["end_of_text"] == 2
    corpus = open_corpus(DataConfig("prepared", str(store)), 32000)
    assert corpus.tokenizer == store / "tokenizer.model"
    with pytest.raises(UserError, match=r"model\.vocab_size=31999: the tokenizer has 32000 tokens"):
        open_corpus(DataConfig("prepared", str(store)), 31999)


def test_mistakes(inputs, tmp_path):
    for name, value in [("validation", 0.0), ("test", 0.5), ("validation", -1.0)]:
        with pytest.raises(UserError, match=rf"--{name}={value}: must be a share of the documents"):
            Settings("bpe:300", **{name: value})
    for tokenizer in ("bpe:256", "bpe:", "bpe:many", "bpe:-5", "bpe:16777217", "bpe:" + "9" * 5000):
        with pytest.raises(UserError, match=rf"--tokenizer='{tokenizer}': give bpe:N"):
            Settings(tokenizer)
    with pytest.raises(UserError, match=r"--tokenizer='none.json': cannot be read"):
        prepared(inputs, tmp_path / "store", Settings("none.json"))
    assert not (tmp_path / "store").exists()


def test_a_mistake_leaves_nothing_that_prevents_the_second_try(tmp_path):
    """The mistake is found at the start, or in the last unit of work."""
    folder, output = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(texts(300)))
    (folder / "other.csv").touch()
    (folder / "z.jsonl").write_text("{")
    for settings, words in (
        (dataclasses.replace(SETTINGS, text_field="body"), "--text_field='body': the line at by"),
        (SETTINGS, r"the line at byte 0 of .*z\.jsonl is no JSON"),
    ):
        with pytest.raises(UserError, match=words):
            prepared((str(folder), None), output, settings)
        assert not output.exists()
    late = dataclasses.replace(SETTINGS, tokenizer=str(LLAMA))
    (folder / "z.jsonl").write_text('{"body": "a"}')
    with pytest.raises(UserError, match="--text_field='text': .*has no such field"):
        prepared((str(folder), None), output, late)
    assert [*output.glob("units/*.json")]  # finished units are kept, and the user decides
    (folder / "z.jsonl").unlink()
    words = r"z\.jsonl is new, gone or changed .*\. Delete the folder, or use another --output"
    with pytest.raises(UserError, match=words):
        prepared((str(folder), None), output, late)
    shutil.rmtree(output)
    prepared((str(folder), None), output, Settings("bpe:290"))


def test_every_split_of_a_small_corpus_has_a_document(tmp_path, caplog, monkeypatch):
    """Empty documents are left out."""
    caplog.set_level("INFO", "aoe_jax")
    (tmp_path / "a.jsonl").write_bytes(json_lines([*texts(30), "", ""]))
    for _ in range(2):  # the second time the store is complete
        store = prepared((str(tmp_path), None), tmp_path / "store", Settings("bpe:300"))
        assert re.search(r"small: (\d+)% of its .* for validation, \1% for test", caplog.text)
    numbers = [TokenStore(store, split).documents for split in SPLITS]
    assert sum(numbers) == 30 and min(numbers) > 0
    (tmp_path / "a.jsonl").write_bytes(json_lines([*texts(2), ""]))
    with pytest.raises(UserError, match=r"--input: 2 different documents with text are too few"):
        prepared((str(tmp_path / "*.jsonl"), None), tmp_path / "two", SETTINGS)
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(30)))
    few, pattern = Settings("bpe:300", validation=1e-9), (str(tmp_path / "*.jsonl"), None)
    with pytest.raises(UserError, match=r"test; give more, or leave out --validation=1e-09"):
        prepared(pattern, tmp_path / "three", few)
    monkeypatch.setattr(preparation, "_MOST_EXAMINED", 20)  # the share is found to be too small
    with pytest.raises(UserError, match="--validation=1e-09: no document is in this split"):
        prepared(pattern, tmp_path / "three", few)


def test_a_tokenizer_of_the_hub(inputs, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: str(whole))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    settings = dataclasses.replace(SETTINGS, tokenizer="owner/name-1.5")
    assert files_of(prepared(inputs, tmp_path / "store", settings)) == files_of(whole)
    failures = [ConnectionResetError("reset"), LookupError("no such repository")]
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    hub.snapshot_download = lambda name, allow_patterns: stop(lambda _: failures.pop(0))
    with pytest.raises(UserError, match=r"Hub fails \(no such repository\); correct the path"):
        prepared(inputs, tmp_path / "other", settings)
    failures = [ConnectionResetError("reset")]
    monkeypatch.setattr(retry, "retry_seconds", 0)
    with pytest.raises(MachineFault, match=r"Hub fails \(reset\); it was tried for 0 s"):
        prepared(inputs, tmp_path / "other", settings)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = "--tokenizer='owner/name-1.5': no such file or folder, and the Hugging Face Hub fails"
    with pytest.raises(UserError, match=words):
        prepared(inputs, tmp_path / "other", settings)


def test_two_preparations_of_one_folder(inputs, tmp_path, monkeypatch):
    refused = []

    def again(written):
        if not refused:
            with pytest.raises(UserError, match=r"--output=.* is in use by process"):
                prepared(inputs, tmp_path / "store")
            refused.append(True)

    interrupted(inputs, tmp_path / "store", monkeypatch, again)
    assert refused


def test_input_that_changes_meanwhile_is_noticed(inputs, tmp_path, monkeypatch):
    folder = shutil.copytree(inputs[0].removesuffix("**"), tmp_path / "in")

    def change(written):
        (folder / "sub" / "2.txt").write_text("changed")

    words = r"--input: .*2\.txt has changed since the preparation began\. Prepare it"
    with pytest.raises(UserError, match=words):
        interrupted((str(folder / "**"), None), tmp_path / "store", monkeypatch, change)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("left", ["plan.json.tpu-9-7.partial", "manifest.json.tpu-9-7.partial"])
def test_files_that_a_kill_leaves_half(inputs, whole, tmp_path, left):
    output = tmp_path / "store"
    if left.startswith("manifest"):
        shutil.copytree(whole, output)
        (output / "manifest.json").unlink()
    output.mkdir(exist_ok=True)
    (output / left).touch()
    assert files_of(prepared(inputs, output)) == files_of(whole)

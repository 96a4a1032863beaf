import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from aoe_jax.data import SPLITS
from aoe_jax.data.corpora import Sotu, load_corpus, speech_files
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from tests.data.hub import POEMS, hub
from tests.runs import ROOT


class OnlyTrain(tfds.core.GeneratorBasedBuilder):
    """A data set with only a train split of 45 documents; its preparation can be made to fail."""

    VERSION = tfds.core.Version("1.0.0")
    split, failures = "train", ()

    def _info(self):
        features = {
            "body": tfds.features.Text(),
            "words": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.failures:
            raise self.failures.pop()
        return {self.split: self._generate_examples()}

    def _generate_examples(self):
        for i in range(45):
            yield i, {"body": f"document {i}", "words": []}


class OnlyTest(OnlyTrain):
    """A data set without a train split."""

    split = "test"


def documents(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def sizes(found):
    return tuple(len(found[split]) for split in SPLITS)


def loaded(folder):
    return documents(load_corpus("text", str(folder), "unused"))


def write_documents(folder, numbers):
    for i in numbers:
        (folder / f"{i}.txt").write_text(f"document {i}")
    return loaded(folder)


def test_sotu_has_every_address_stratified_over_time(sotu_cache, sotu_directory):
    builder = Sotu(data_dir=str(sotu_cache / "tfds"), file_format="array_record")
    ids = {
        split: [row["id"].decode() for row in builder.as_data_source(split=split)]
        for split in SPLITS
    }
    assert sizes(ids) == (225, 12, 12)
    chronological = sorted(name for names in ids.values() for name in names)
    assert len(set(chronological)) == 249
    assert chronological[0].startswith("1790") and chronological[-1].startswith("2026")
    assert sorted(ids["validation"]) == chronological[9::20]
    assert sorted(ids["test"]) == chronological[19::20]
    found = documents(load_corpus("sotu", None, str(sotu_cache)))
    texts = {path.read_bytes().decode() for path in speech_files()}
    assert {text for split in SPLITS for text in found[split]} == texts


def test_sotu_needs_neither_tensorflow_nor_pandas(tmp_path):
    code = (
        "import sys; from aoe_jax.data.corpora import load_corpus;"
        f"assert len(list(load_corpus('sotu', None, {str(tmp_path)!r}).documents('test'))) == 12;"
        "assert not {'tensorflow', 'pandas'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ""


def test_text_folder_has_every_file_once(text_folder, tmp_path, caplog):
    """Links to files are followed, links to folders are not; a message names empty files."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked.txt").write_text("linked words")
    (text_folder / "one.txt").symlink_to(tmp_path / "elsewhere/linked.txt")
    contents = sorted(path.read_bytes().decode() for path in text_folder.rglob("*.txt"))
    (text_folder / "folder").symlink_to(tmp_path / "elsewhere")
    (text_folder / "broken.txt").symlink_to(tmp_path / "nothing.txt")
    (text_folder / "empty.txt").touch()
    found = loaded(text_folder)
    assert all(found.values())
    assert sorted(text for texts in found.values() for text in texts) == contents
    for name in ("empty.txt", "broken.txt"):
        assert f"{name}, which is empty or a broken link" in caplog.text


@pytest.mark.parametrize("count", [3, 4, 10])
def test_small_text_folder_has_no_empty_split(tmp_path, count):
    found = write_documents(tmp_path, range(count))
    assert all(found.values()) and sum(sizes(found)) == count


def test_added_files_move_no_others(tmp_path):
    before = write_documents(tmp_path, range(400))
    after = write_documents(tmp_path, range(400, 800))
    for split in SPLITS:
        assert set(before[split]) <= set(after[split])
    assert 20 <= len(after["validation"]) <= 60 and 20 <= len(after["test"]) <= 60


def test_fingerprint_follows_names_and_contents(text_folder, tmp_path):
    def fingerprint(folder):
        return load_corpus("text", str(folder), "unused").fingerprint

    original = fingerprint(text_folder)
    copy = shutil.copytree(text_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(copy) == original
    (copy / "00.txt").rename(copy / "renamed.txt")
    assert fingerprint(copy) != original
    (text_folder / "00.txt").write_text("Document 1: end.")  # the length does not change
    assert fingerprint(text_folder) != original


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, r"data.path='.*texts': no such folder of .txt files; correct"),
        ({"readme.md": b"not text"}, r"data.path='.*texts': the folder has no .txt file"),
        ({"a.txt": b"a", "b.txt": b"b", "c.txt": b""}, r"2 non-empty .txt file.*at least 3"),
        (dict.fromkeys(["a.txt", "b.txt", "c.txt"], b"caf\xe9"), r"\.txt is not UTF-8 at byte 3"),
    ],
)
def test_text_folder_mistakes(tmp_path, files, words):
    folder = tmp_path / "texts"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        loaded(folder)


def test_a_text_that_changes_before_it_is_read_is_noticed(text_folder):
    """Otherwise the cache would store the new text under the fingerprint of the old text."""
    corpus = load_corpus("text", str(text_folder), "unused")
    for file in text_folder.rglob("*.txt"):
        file.write_text("other words")
    with pytest.raises(UserError, match=r"data.path=.*\.txt has just changed; start again"):
        documents(corpus)


def test_missing_tfds_splits_are_cut_from_train(tmp_path):
    corpus = load_corpus("only_train", None, str(tmp_path), "body")
    found = documents(corpus)
    assert sizes(found) == (41, 2, 2)
    texts = {text for texts in found.values() for text in texts}
    assert texts == {f"document {i}" for i in range(45)}
    again = load_corpus("only_train:1.0.0", str(tmp_path / "tfds"), "unused", "body")
    assert documents(again) == found and again.fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    ("name", "text_field", "failure", "message"),
    [
        ("hf:a/b", "text", None, r"'hf:a/b': unknown;.* or huggingface:a/b for the Hugging"),
        ("lm1bb", "text", None, r"'lm1bb': unknown; give sotu, text, .*; did you mean lm1b\?"),
        ("wiki40/en", "text", None, r"data.name='wiki40/en': unknown.*wiki40b"),
        (
            "../texts",
            "text",
            None,
            r"data.name='../texts': TFDS cannot prepare it: ValueError",
        ),
        ("only_train:7.0.0", "body", None, r"'only_train:7.0.0': TFDS cannot prepare it"),
        ("only_train", "text", None, r"data.text_field='text': the text features of .*\['body'\]"),
        ("only_test", "body", None, r"data.name='only_test': has no train split, only \['test'\]"),
        (
            "only_train",
            "body",
            OSError("no network"),
            "cannot prepare it: OSError: .*no network",
        ),
        (
            "only_train",
            "body",
            ImportError("No module x"),
            "needs a package.*No module x.*data.path",
        ),
        ("only_train", "body", PermissionError(errno.EACCES, "Denied"), r"prepare it \(Denied\)"),
    ],
)
def test_tfds_mistakes(tmp_path, monkeypatch, name, text_field, failure, message):
    monkeypatch.setattr(OnlyTrain, "failures", [failure] if failure else [])
    with pytest.raises(UserError, match=message):
        load_corpus(name, str(tmp_path), "unused", text_field)


def test_tfds_waits_for_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    fault = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(OnlyTrain, "failures", [fault] * 2)
    assert documents(load_corpus("only_train", str(tmp_path / "a"), "unused", "body"))["test"]
    monkeypatch.setattr(OnlyTrain, "failures", [fault] * 99)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    wanted = r"name='only_train': TFDS cannot prepare it \(Stale file handle\); it was tried"
    with pytest.raises(MachineFault, match=wanted):
        load_corpus("only_train", str(tmp_path / "b"), "unused", "body")


def test_tfds_data_in_another_file_format(tmp_path):
    OnlyTrain(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    info = tmp_path / "only_train" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"TFDS cannot prepare it.*TFRECORD.*\n.*array_record"):
        load_corpus("only_train", str(tmp_path), "unused", "body")


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--config.data.cache=.*/file/tfds cannot be written"):
        load_corpus("sotu", None, str(tmp_path / "file"))


LOAD = """
import json, sys
from aoe_jax.data import SPLITS
from aoe_jax.data.corpora import load_corpus
from aoe_jax.errors import UserError
try:
    corpus = load_corpus(sys.argv[1], None, sys.argv[2])
    documents = {split: list(corpus.documents(split)) for split in SPLITS}
    print(json.dumps([corpus.fingerprint, documents]))
except (UserError, ModuleNotFoundError) as error:
    print(json.dumps([str(error)]))
"""


def load_from_hub(name, cache, endpoint, before=""):
    """Runs `LOAD` in another process with the hub at `endpoint`, and returns its output."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": f"{cache}/hf",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", before + LOAD, name, str(cache)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_hugging_face_data_set_through_tfds(tmp_path):
    with hub() as endpoint:
        fingerprint, found = load_from_hub("huggingface:org/poems", tmp_path, endpoint)
        assert sizes(found) == (54, 3, 3)
        assert sorted(text for texts in found.values() for text in texts) == sorted(POEMS)
        (error,) = load_from_hub("huggingface:org/prose", tmp_path, endpoint)
        assert "org/prose': TFDS cannot prepare it: RuntimeError: Failed to load" in error
    without_datasets = "import sys; sys.modules['datasets'] = None\n"
    again = load_from_hub("huggingface:org/poems", tmp_path, endpoint, without_datasets)
    assert again == [fingerprint, found]
    (error,) = load_from_hub("huggingface:org/new", tmp_path, endpoint, without_datasets)
    assert "import of datasets halted" in error
    (error,) = load_from_hub("huggingface:poems", tmp_path, endpoint)
    assert "ValueError: name a data set of the hub as huggingface:OWNER/NAME" in error

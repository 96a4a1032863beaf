"""The group `data`."""

import dataclasses
import os
from dataclasses import dataclass

from aoe_jax.config.checks import check_settings, require, setting
from aoe_jax.config.sources import absolute, label_of, mixture_in_words, parsed_sources


@dataclass(frozen=True)
class DataConfig:
    """The corpora and how they are cut into sequences.

    `name` is one corpus, or several in a mixture: `SOURCE[=WEIGHT], SOURCE[=WEIGHT], ...`, where
    SOURCE is `NAME` or `NAME@PATH`. All have a weight, or none: then each counts by its size, so
    that one pass over the mixture is one over all.
    """

    # sotu | text | prepared | huggingface:OWNER/NAME | any TFDS name, or a mixture of them
    name: str = "sotu"
    # text: a folder of .txt files; prepared: a token store; TFDS: its data_dir. In a mixture each
    # names its own with @PATH.
    path: str | None = None
    cache: str = "~/.cache/aoe_jax"  # everything that is prepared once lies here
    # A Hugging Face tokenizer.json or a SentencePiece model; None: that of the prepared stores, or
    # byte-level BPE trained on the train splits.
    tokenizer: str | None = None
    text_field: str = "text"  # the feature of a TFDS data set that holds the text
    seq_len: int = setting(256, above=0)  # tokens of a sequence in training and validation
    document_mask: bool = False  # attend within a document only
    # No training loss on the first token of a document, which nothing foretells.
    loss_mask: bool = False

    def __post_init__(self):
        sources = parsed_sources(self.name)
        require(
            self.path is None or (len(sources) == 1 and sources[0].path is None),
            "data.path",
            self.path,
            f"leave it at None where data.name={self.name!r} names paths of its own, as NAME@PATH",
        )
        for source in sources:
            folder = {"text": "folder of .txt files", "prepared": "folder of a token store"}.get(
                source.name
            )
            if folder and not (source.path or self.path):
                if len(sources) == 1:
                    require(False, "data.path", self.path, f"name the {folder}")
                require(False, "data.name", self.name, f"name the {folder} as {source.name}@FOLDER")
        check_settings("data", self)
        object.__setattr__(self, "cache", os.path.abspath(os.path.expanduser(self.cache)))
        object.__setattr__(self, "name", mixture_in_words(sources))
        if self.path is not None:
            object.__setattr__(self, "path", absolute(self.path))

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        require(
            self.seq_len <= config.model.max_len,
            "data.seq_len",
            self.seq_len,
            f"is longer than model.max_len={config.model.max_len}",
        )

    @property
    def sources(self):
        """The corpora in order, each with its path; `SourceConfig`s."""
        sources = parsed_sources(self.name)
        if self.path is not None:
            sources = [dataclasses.replace(sources[0], path=self.path)]
        labels = [label_of(source) for source in sources]
        if len(set(labels)) < len(labels):
            labels = [f"{number}-{label}" for number, label in enumerate(labels, 1)]
        return tuple(
            dataclasses.replace(source, label=label)
            for source, label in zip(sources, labels, strict=True)
        )

    @property
    def name_without_paths(self):
        """`name` as a corpus keeps it when it moves."""
        return mixture_in_words(
            [dataclasses.replace(source, path=None) for source in parsed_sources(self.name)]
        )

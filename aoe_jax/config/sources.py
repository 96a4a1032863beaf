"""The grammar of `data.name`: one corpus, or several with weights."""

import os
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from aoe_jax.errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of `data.name`."""

    label: str  # what metrics call it; no two of a run have the same
    name: str  # sotu | text | prepared | any TFDS name
    path: str | None
    # Share of the tokens seen in training, in proportion to those of the others.
    weight: Fraction | None


def parsed_sources(name):
    """The corpora that `data.name` names, without labels."""

    def require(condition, wanted):
        if not condition:
            raise UserError(f"config.data.name={name!r}: {wanted}")

    sources = []
    for entry in name.split(","):
        source, equals, weight = entry.rpartition("=")
        corpus, at, path = (source if equals else entry).strip().partition("@")
        require(
            bool(corpus),
            "name a corpus: sotu, text, prepared or a TFDS name, or a mixture such as sotu=1, c4=3",
        )
        require(not at or bool(path), f"{corpus}@ lacks its path")
        try:
            share = Fraction(weight.strip()) if equals else None
        except (ValueError, ZeroDivisionError):
            require(False, f"the weight {weight.strip()!r} of {source.strip()} is no number")
        require(
            share is None or share > 0, f"the weight of {source.strip()} must be greater than 0"
        )
        sources.append(SourceConfig("", corpus, absolute(path) if at else None, share))
    require(
        len({source.weight is None for source in sources}) == 1,
        "give every corpus a weight, or none of them",
    )
    twice, count = Counter((source.name, source.path) for source in sources).most_common(1)[0]
    require(count == 1, f"{twice[0]} is named twice; name it once, with one weight")
    return sources


def mixture_in_words(sources):
    """`data.name` of sources, in one way of writing."""

    def in_words(source):
        path = "" if source.path is None else f"@{source.path}"
        return (
            source.name
            + path
            + ("" if source.weight is None else f"={_number_in_words(source.weight)}")
        )

    return ", ".join(map(in_words, sources))


def _number_in_words(number):
    decimal = repr(float(number)).removesuffix(".0")
    return decimal if Fraction(decimal) == number else str(number)


def label_of(source):
    """The last part of the path, where that is what tells corpora apart, or the name."""
    return (
        os.path.basename(source.path)
        if source.name in ("text", "prepared") and source.path
        else source.name
    )


def absolute(path):
    """A path from the root, with `~` as the home."""
    return os.path.abspath(os.path.expanduser(path))

"""Reads documents from JSON lines, Parquet and plain text, in pieces that are independent."""

import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from aoe_jax.errors import UserError, shown
from aoe_jax.storage.files import open_regular
from aoe_jax.storage.paths import find, parsed_path
from aoe_jax.storage.retry import patiently, refusing

DOCUMENT_BYTES = 2**29  # the largest document, and the longest line of JSON
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
_TEXT = ".txt"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20
_BATCH_ROWS, _BATCH_BYTES = 256, 2**26  # of Parquet that are in memory at a time, on average
_UNREADABLE = (OSError, pyarrow.ArrowException, UnicodeDecodeError)


class Piece(NamedTuple):
    """A part of a file, `start` to `stop`: of the bytes of JSON lines, with the lines that begin
    there, or of the row groups of Parquet. A piece of any other format is the whole file.
    """

    path: str
    start: int
    stop: int


def find_files(patterns: Sequence[str], output) -> dict:
    """The files that match glob patterns (`**`: folders of any depth), sorted by path, each with
    its `size_and_version`.

    Broken links and files in `output` are left out. Raises `UserError` if a pattern matches no
    file, a file has an unknown format, or a folder cannot be read.
    """
    found = {}
    for pattern in patterns:
        parsed_path(pattern, "--input", in_store=True, is_pattern=True)
        what = f"--input={pattern!r} cannot be read"
        matching = patiently(what, partial(find, pattern)).items()
        matching = {path: state for path, state in matching if state and output not in path.parents}
        if not matching:
            raise UserError(
                f"--input={pattern!r}: matches no file; give a pattern such as 'data/**/*.jsonl.gz'"
            )
        found |= matching
    for path, (size, _) in found.items():
        kind, compression = _format(path)
        if kind is None:
            raise UserError(
                f"--input: {path} is in no known format; give files that end in .jsonl, .ndjson, "
                ".json (JSON lines) or .txt, also with .gz or .zst, or in .parquet"
            )
        if compression and size == 0:
            raise UserError(f"--input: {path} is empty, so it is truncated; mend or remove it")
    return {path: found[path] for path in sorted(found, key=os.fspath)}


def pieces_of(path, size: int, piece_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file of `size` bytes, each with its size: about `piece_bytes`, but compressed
    files and texts are one piece. Raises `UserError` if the file cannot be read.
    """
    kind, compression = _format(path)
    if kind == _PARQUET:
        with refusing(f"--input: {path} cannot be read", "; mend or remove it", _UNREADABLE):
            return list(_row_groups(path, piece_bytes))
    cuts = [*range(0, size, piece_bytes), size]
    if kind == _TEXT or compression or size == 0:
        cuts = [0, size]
    return [
        (Piece(str(path), start, stop), stop - start) for start, stop in itertools.pairwise(cuts)
    ]


def documents(piece: Piece, text_field: str) -> Iterator[str]:
    """The texts of a piece, which may be empty; half of a surrogate pair becomes U+FFFD.

    `text_field` is the field of JSON or column of Parquet with the text. Raises `UserError` if the
    file cannot be read, is damaged, or has an entry without a text.
    """
    kind, compression = _format(Path(piece.path))
    what = f"--input: {piece.path} cannot be read"
    with refusing(what, "; mend or remove it", _UNREADABLE), open_regular(piece.path) as file:
        if kind == _PARQUET:
            yield from _parquet(file, piece, text_field)
            return
        if compression:
            file = io.BufferedReader(pyarrow.input_stream(file, compression), _READ_BYTES)
            piece = piece._replace(stop=math.inf)
        if kind == _TEXT:
            yield _text(file, piece.path)
        else:
            yield from _json_lines(file, piece, text_field)


def _format(path: Path) -> tuple[str | None, str | None]:
    """`(kind, compression)` by the end of the name; the kind is None if it is unknown."""
    compression = _COMPRESSIONS.get(path.suffix)
    kind = path.with_suffix("").suffix if compression else path.suffix
    known = (*_JSON_LINES, _TEXT) if compression else (*_JSON_LINES, _TEXT, _PARQUET)
    return (kind if kind in known else None), compression


def _row_groups(path, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    with open_regular(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    start = size = 0
    for stop, group in enumerate(groups, 1):
        size += group.total_byte_size
        if size >= piece_bytes or stop == len(groups):
            yield Piece(str(path), start, stop), size
            start, size = stop, 0


def _parquet(raw: BinaryIO, piece: Piece, text_field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(raw) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            raise _no_field(piece.path, "column", text_field, columns)
        for number in range(piece.start, piece.stop):
            group = file.metadata.row_group(number)
            rows = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
            rows = min(max(rows, 1), _BATCH_ROWS)
            for batch in file.iter_batches(rows, row_groups=[number], columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, f"row group {number} of {piece.path}", text_field)


def _json_lines(file: BinaryIO, piece: Piece, text_field: str) -> Iterator[str]:
    position = piece.start
    if position > 0:  # a line that begins before the piece belongs to the piece before
        position = file.seek(position - 1)
        position += len(file.readline(piece.stop - position))
    while position < piece.stop and (line := file.readline(DOCUMENT_BYTES + 1)):
        where = f"the line at byte {position} of {piece.path}"
        if piece.stop == math.inf:
            where += ", decompressed,"
        if len(line) > DOCUMENT_BYTES:
            raise _too_long(where)
        position += len(line)
        if not line.isspace():
            yield _checked(_value(line, where, text_field), where, text_field)


def _value(line: bytes, where: str, text_field: str) -> object:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--input: {where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(
            f"--input: {where} is no JSON object; each line is one, with a field {text_field!r}"
        )
    if text_field not in value:
        raise _no_field(where, "field", text_field, list(value))
    return value[text_field]


def _text(file: BinaryIO, path: str) -> str:
    content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise _too_long(path)
    return content.decode("utf-8-sig")


def _checked(text: object, where: str, text_field: str) -> str:
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"--text_field={text_field!r}: {where} has a {kind} there, not a text")
    if len(text) > DOCUMENT_BYTES:
        raise _too_long(where)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_field(where: str, kind: str, text_field: str, there: list) -> UserError:
    wanted = f"has no such {kind}; it has {shown(there)}"
    return UserError(f"--text_field={text_field!r}: {where} {wanted}")


def _too_long(where: str) -> UserError:
    return UserError(
        f"--input: {where} is longer than {DOCUMENT_BYTES >> 20} MiB, the longest document that "
        "is read; split or remove it"
    )

"""Divides files of JSON lines, Parquet or plain text into pieces, and reads their documents."""

import glob
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

from aoe_jax.data import DOCUMENT_BYTES
from aoe_jax.errors import UserError, shown
from aoe_jax.storage.files import open_file
from aoe_jax.storage.paths import find, parsed_path
from aoe_jax.storage.retry import patiently, refusing

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20
_BATCH_ROWS, _BATCH_BYTES = 256, 2**26  # limits of a batch of Parquet rows: rows, bytes
_UNREADABLE = (OSError, pyarrow.ArrowException, UnicodeDecodeError)


class Piece(NamedTuple):
    """A part of a file. For Parquet, `start` and `stop` are row-group indices. For JSON lines they
    are byte positions; the piece has the lines that begin between them. Other files are one piece.
    """

    path: str
    start: int
    stop: int


def find_files(patterns: Sequence[str], output) -> dict:
    """Returns `{path: size_and_version}`, sorted by path, of the files that match glob patterns. In
    a pattern, `**` matches folders of any depth. A folder means all documents in it.

    Broken links and files in `output` are left out. Raises `UserError` if a pattern matches no
    file, a file has an unknown format or is an empty compressed file, or a folder cannot be read.
    """
    found = {}
    for pattern in patterns:
        path = parsed_path(pattern, "--input", in_store=True, is_pattern=True)
        what = f"--input={pattern!r}"
        if is_folder := patiently(f"{what} cannot be read", path.is_dir):
            pattern = f"{glob.escape(os.fspath(path))}/**"
        matching = patiently(f"{what} cannot be read", partial(find, pattern)).items()
        matching = {path: state for path, state in matching if state and output not in path.parents}
        if is_folder:
            matching = {path: state for path, state in matching.items() if _format(path)[0]}
        if not matching:
            wanted = "has no documents" if is_folder else "matches no file"
            raise UserError(f"{what}: {wanted}; give a pattern such as 'data/**/*.jsonl.gz'")
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


def _format(path: Path) -> tuple[str | None, str | None]:
    """Returns `(kind, compression)` by a file's name; the kind of an unknown format is None."""
    compression = _COMPRESSIONS.get(path.suffix)
    kind = path.with_suffix("").suffix if compression else path.suffix
    known = (*_JSON_LINES, ".txt", *([] if compression else [".parquet"]))
    return (kind if kind in known else None), compression


def pieces_of(path, size: int, piece_bytes: int) -> list[tuple[Piece, int]]:
    """Splits a file into pieces of about `piece_bytes`. Returns a list of `(piece, its size)`.
    Raises `UserError` if the file cannot be read.
    """
    kind, compression = _format(path)
    if kind == ".parquet":
        with refusing(f"--input: {path} cannot be read", "; mend or remove it", _UNREADABLE):
            return list(_row_groups(path, piece_bytes))
    if kind == ".txt" or compression or size == 0:
        return [(Piece(str(path), 0, size), size)]
    cuts = itertools.pairwise([*range(0, size, piece_bytes), size])
    return [(Piece(str(path), start, stop), stop - start) for start, stop in cuts]


def _row_groups(path, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    with open_file(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    start = size = 0
    for stop, group in enumerate(groups, 1):
        size += group.total_byte_size
        if size >= piece_bytes or stop == len(groups):
            yield Piece(str(path), start, stop), size
            start, size = stop, 0


def documents(piece: Piece, text_field: str) -> Iterator[str]:
    """Yields the texts of a piece, including empty ones. Lone surrogates are replaced by U+FFFD.

    `text_field` is the name of the JSON field or Parquet column with the text. Raises `UserError`
    if the file cannot be read or is damaged, or if a line or row has no text or is too long.
    """
    kind, compression = _format(Path(piece.path))
    what = f"--input: {piece.path} cannot be read"
    with refusing(what, "; mend or remove it", _UNREADABLE), open_file(piece.path) as file:
        if kind == ".parquet":
            yield from _parquet(file, piece, text_field)
            return
        if compression:
            file = io.BufferedReader(pyarrow.input_stream(file, compression), _READ_BYTES)
            piece = piece._replace(stop=math.inf)
        if kind == ".txt":
            content = file.read(DOCUMENT_BYTES + 1)
            _check_length(content, piece.path)
            yield content.decode("utf-8-sig")
        else:
            yield from _json_lines(file, piece, text_field)


def _parquet(raw: BinaryIO, piece: Piece, text_field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(raw) as file:
        columns = file.schema_arrow.names
        if text_field not in columns:
            raise _no_text(piece.path, text_field, f"has no such column; it has {shown(columns)}")
        for number in range(piece.start, piece.stop):
            group = file.metadata.row_group(number)
            rows = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
            rows = min(max(rows, 1), _BATCH_ROWS)
            for batch in file.iter_batches(rows, row_groups=[number], columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, f"row group {number} of {piece.path}", text_field)


def _json_lines(file: BinaryIO, piece: Piece, text_field: str) -> Iterator[str]:
    position = piece.start
    if position > 0:  # skips the rest of a line that begins in the previous piece
        position = file.seek(position - 1)
        position += len(file.readline(piece.stop - position))
    while position < piece.stop and (line := file.readline(DOCUMENT_BYTES + 1)):
        where = f"the line at byte {position} of {piece.path}"
        if piece.stop == math.inf:
            where += ", decompressed,"
        _check_length(line, where)
        position += len(line)
        if not line.isspace():
            yield _checked(_value(line, where, text_field), where, text_field)


def _value(line: bytes, where: str, text_field: str) -> object:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--input: {where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        wanted = f"is no JSON object; each line must be one, with a field {text_field!r}"
        raise UserError(f"--input: {where} {wanted}")
    if text_field not in value:
        raise _no_text(where, text_field, f"has no such field; it has {shown(list(value))}")
    return value[text_field]


def _checked(text: object, where: str, text_field: str) -> str:
    if not isinstance(text, str):
        raise _no_text(where, text_field, f"has a {type(text).__name__} in this field, not a text")
    _check_length(text, where)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_length(content: bytes | str, where: str):
    if len(content) > DOCUMENT_BYTES:
        limit = f"{DOCUMENT_BYTES >> 20} MiB, the size limit of a document"
        raise UserError(f"--input: {where} is longer than {limit}; split or remove it")


def _no_text(where: str, text_field: str, problem: str) -> UserError:
    return UserError(f"--text_field={text_field!r}: {where} {problem}")

"""Reads documents from JSON lines, Parquet and plain text, in pieces that are independent."""

import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from aoe_jax.errors import UserError, shown
from aoe_jax.storage.paths import file_system, find, is_remote, parsed_path
from aoe_jax.storage.retry import patiently_if_allowed, refusing

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
_TEXT = ".txt"
_ERRORS = (OSError, pyarrow.ArrowException)  # of reading a file
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20
DOCUMENT_BYTES = 2**29  # the largest document, and the longest line of JSON
# Text is seldom compressed more than tenfold. Files are checked from 64 MiB on.
_RATIO, _RATIO_FROM = 256, 2**26
_MOST_VALUES = 2**21  # in a line of JSON, counted by its "[", "{" and ","
_NO_MARKS = bytes({*range(256)} - {*b'[{,"'})
_BATCH_ROWS, _BATCH_BYTES = 256, 2**26  # of Parquet that are in memory at a time, on average


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

    Files in `output` are left out. Raises `UserError` if a pattern matches no file, a file has an
    unknown format, a folder cannot be read, or a link is broken.
    """
    found = {}
    for pattern in patterns:
        parsed_path(pattern, "--input", in_store=True, is_pattern=True)
        what = f"--input={pattern!r} cannot be read"
        matching = patiently_if_allowed(what, partial(find, pattern))
        matching = {path: matching[path] for path in matching if output not in path.parents}
        if not matching:
            raise UserError(
                f"--input={pattern!r}: matches no file; give a pattern such as 'data/**/*.jsonl.gz'"
            )
        found |= matching
    for path, state in found.items():
        if state is None:
            raise UserError(f"--input: {path} is a broken link; mend or remove it")
        if not is_remote(path) and not path.is_file():
            raise UserError(f"--input: {path} is a FIFO or a device; give regular files")
        kind, compression = _format(path)
        if kind is None:
            raise UserError(
                f"--input: {path} is in no known format; give files that end in .jsonl, .ndjson, "
                ".json (JSON lines) or .txt, also with .gz or .zst, or in .parquet"
            )
        if compression and state[0] == 0:
            raise UserError(f"--input: {path} is empty, so it is truncated; mend or remove it")
    return {path: found[path] for path in sorted(found, key=os.fspath)}


def pieces_of(path, size: int, piece_bytes: int) -> list[tuple[Piece, int]]:
    """The pieces of a file of `size` bytes, each with its size: about `piece_bytes`, but compressed
    files and texts are one piece. Raises `UserError` if the file cannot be read.
    """
    kind, compression = _format(path)
    if kind == _PARQUET:
        with refusing(f"--input: {path} cannot be read", kinds=_ERRORS):
            return list(_row_groups(path, piece_bytes))
    cuts = [*range(0, size, piece_bytes), size]
    if kind == _TEXT or compression or size == 0:
        cuts = [0, size]
    return [
        (Piece(str(path), start, stop), stop - start) for start, stop in itertools.pairwise(cuts)
    ]


def documents(piece: Piece, text_field: str) -> Iterator[tuple[str, int]]:
    """The texts of a piece, each with the number of bytes read of the piece so far.

    Texts may be empty; half of a surrogate pair becomes U+FFFD. `text_field` is the field of JSON
    or column of Parquet with the text. Raises `UserError` if the file cannot be read, is damaged,
    or has an entry without a text.
    """
    kind, compression = _format(Path(piece.path))
    what = f"--input: {piece.path} cannot be read"
    with refusing(what, "; mend or remove it", _ERRORS), _open(piece.path) as file:
        if kind == _PARQUET:
            yield from _parquet(piece, file, text_field)
        elif kind == _TEXT:
            yield _text(piece, file, compression), piece.stop
        else:
            yield from _json_lines(piece, file, compression, text_field)


def _format(path: Path) -> tuple[str | None, str | None]:
    """`(kind, compression)` by the end of the name; the kind is None if it is unknown."""
    compression = _COMPRESSIONS.get(path.suffix)
    kind = path.with_suffix("").suffix if compression else path.suffix
    known = (*_JSON_LINES, _TEXT) if compression else (*_JSON_LINES, _TEXT, _PARQUET)
    return (kind if kind in known else None), compression


def _open(path) -> pyarrow.NativeFile:
    if is_remote(path):
        return pyarrow.PythonFile(file_system(path).open(os.fspath(path)), "r")
    return pyarrow.OSFile(os.fsencode(path))  # a name need not be UTF-8


def _row_groups(path, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    with _open(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        _refuse_missing_rows(sum(g.num_rows for g in groups), file.metadata.num_rows, path)
    start = size = 0
    for stop, group in enumerate(groups, 1):
        size += group.total_byte_size
        if size >= piece_bytes or stop == len(groups):
            yield Piece(str(path), start, stop), size
            start, size = stop, 0


def _parquet(piece: Piece, raw: pyarrow.NativeFile, text_field: str) -> Iterator[tuple[str, int]]:
    try:  # without a dictionary, 256 rows that refer to one long text would be 256 copies
        opened = pyarrow.parquet.ParquetFile(raw, read_dictionary=[text_field])
    except KeyError:
        schema = pyarrow.parquet.read_schema(raw)
        problem = f"has no such column; it has {shown(schema.names)}"
        if text_field in schema.names:
            problem = f"has a {schema.field(text_field).type} there, not a text"
        raise UserError(f"--text_field={text_field!r}: {piece.path} {problem}") from None
    with opened as file:
        done = n_bytes = n_compressed = 0
        for group in range(piece.start, piece.stop):
            where, seen = f"row group {group} of {piece.path}", 0
            metadata = file.metadata.row_group(group)
            rows, size = _batch_rows(metadata, text_field, piece.path)
            n_compressed += size
            for batch in file.iter_batches(rows, row_groups=[group], columns=[text_field]):
                seen += len(batch)
                read = done + metadata.total_byte_size * seen // max(metadata.num_rows, 1)
                for value in batch.column(0):
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"--input: {where} is not UTF-8 ({error.reason}); mend or remove it"
                        ) from error
                    text = _checked(text, where, text_field)
                    n_bytes += len(text)  # each reference to a text in a dictionary counts
                    _refuse_bomb(n_bytes, n_compressed, piece.path)
                    yield text, read
            _refuse_missing_rows(seen, metadata.num_rows, where)
            done += metadata.total_byte_size


def _refuse_missing_rows(n_rows: int, n_expected: int, where):
    if n_rows < n_expected:
        raise UserError(
            f"--input: {where} has {n_rows} rows instead of {n_expected}; mend or remove it"
        )


def _batch_rows(
    group: pyarrow.parquet.RowGroupMetaData, text_field: str, path: str
) -> tuple[int, int]:
    """How many rows of a row group to read at a time, and the compressed size of its texts."""
    columns = map(group.column, range(group.num_columns))
    texts = [column for column in columns if column.path_in_schema == text_field]
    n_bytes = sum(column.total_uncompressed_size for column in texts)
    n_compressed = sum(column.total_compressed_size for column in texts)
    _refuse_bomb(n_bytes, n_compressed, path)
    rows = min(max(group.num_rows * _BATCH_BYTES // max(n_bytes, 1), 1), _BATCH_ROWS)
    return rows, n_compressed


def _text(piece: Piece, raw: pyarrow.NativeFile, compression: str | None) -> str:
    stream = pyarrow.CompressedInputStream(raw, compression) if compression else raw
    content = io.BufferedReader(stream, _READ_BYTES).read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise _too_long(piece.path)
    if compression:
        _refuse_bomb(len(content), piece.stop, piece.path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--input: {piece.path} is not UTF-8 at byte {error.start}; convert or remove it"
        ) from error


def _too_long(where: str) -> UserError:
    return UserError(
        f"--input: {where} is longer than {DOCUMENT_BYTES >> 20} MiB, the longest document that "
        "is read; split or remove it"
    )


def _refuse_bomb(n_bytes: int, n_compressed: int, path: str):
    """Refuses a file that expands to far more bytes than a text would."""
    if n_bytes > _RATIO_FROM and n_bytes > _RATIO * n_compressed:
        raise UserError(
            f"--input: {path}: {n_compressed} bytes of it expand to more than {_RATIO} times that "
            "size, which no text does; remove it, or decompress it yourself"
        )


def _json_lines(
    piece: Piece, raw: pyarrow.NativeFile, compression: str | None, text_field: str
) -> Iterator[tuple[str, int]]:
    stream = pyarrow.CompressedInputStream(raw, compression) if compression else raw
    stream = io.BufferedReader(stream, _READ_BYTES)
    position = piece.start
    if piece.start > 0:
        # A line that begins before the piece belongs to the piece before. If it ends after this
        # piece, this piece has no line.
        position = stream.seek(piece.start - 1)
        while position < piece.stop and (part := stream.readline(_READ_BYTES)):
            position += len(part)
            if part.endswith(b"\n"):
                break
    while (compression or position < piece.stop) and (line := stream.readline(DOCUMENT_BYTES + 1)):
        begin, position = position, position + len(line)
        where = f"the line at byte {begin} of {piece.path}"
        where += ", decompressed," if compression else ""
        if len(line) > DOCUMENT_BYTES:
            raise _too_long(where)
        if compression:
            _refuse_bomb(position, raw.tell(), piece.path)
        if not line.isspace():
            read = raw.tell() if compression else min(position, piece.stop) - piece.start
            yield _checked(_value(line, where, text_field), where, text_field), read


def _value(line: bytes, where: str, text_field: str) -> object:
    _refuse_many_values(line, where, text_field)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--input: {where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(
            f"--input: {where} is no JSON object; each line is one, with a field {text_field!r}"
        )
    if text_field not in value:
        raise UserError(
            f"--text_field={text_field!r}: {where} has no such field; it has {shown(list(value))}"
        )
    return value[text_field]


def _refuse_many_values(line: bytes, where: str, text_field: str):
    """Refuses a line whose values would need far more memory than its texts."""
    if len(line) <= _MOST_VALUES:
        return
    marks = line.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_MARKS)
    in_texts = sum(len(text[0]) for text in re.finditer(rb'"[^"]*"?', marks))
    if len(marks) - in_texts > _MOST_VALUES:
        raise UserError(
            f"--input: {where} has more than {_MOST_VALUES} values, which would need too much "
            f"memory; remove its fields other than {text_field!r}"
        )


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

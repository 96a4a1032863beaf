"""Documents in files: JSON lines, Parquet and plain text, in pieces that can be read apart."""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from aoe_jax.errors import UserError

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
_TEXT = ".txt"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 2**20


class Piece(NamedTuple):
    """A part of a file: of JSON lines the bytes from `start` to `stop`, of Parquet row groups, else
    the whole file.

    The lines of a piece are those that begin in it.
    """

    path: str
    start: int
    stop: int


def find_files(patterns: Sequence[str], output: Path) -> list[Path]:
    """The files that match any of the glob patterns (`**`: folders of any depth), each once, sorted
    by path.

    Those in `output`, which would be what is made of the others, are left out.

    Raises:
        UserError: a pattern matches no file, a file is in no known format, or a link leads nowhere.
    """
    found, left_out = set(), Path(os.path.abspath(output))
    for pattern in patterns:
        matching = {
            Path(os.path.abspath(path))
            for path in glob(os.path.expanduser(pattern), recursive=True)
        }
        matching = {path for path in matching if not path.is_dir() and left_out not in path.parents}
        if not matching:
            raise UserError(
                f"--input={pattern!r}: matches no file; give a pattern such as 'data/**/*.jsonl.zst'"
            )
        found |= matching
    for path in sorted(found):
        if not path.exists():
            raise UserError(f"--input: {path} is a link that leads nowhere; mend or remove it")
        if _format(path)[0] is None:
            raise UserError(
                f"--input: {path} is in no known format; give files that end in .jsonl, .ndjson, .json (JSON lines) "
                "or .txt, also with .gz or .zst, or in .parquet"
            )
    return sorted(found)


def pieces_of(path: Path, piece_bytes: int) -> list[tuple[Piece, int]]:
    """A file in pieces, each with its size: about `piece_bytes`, but a compressed file and a text
    are one piece.

    Raises:
        UserError: the file cannot be read.
    """
    kind, compression = _format(path)
    try:
        size = path.stat().st_size
        if kind == _PARQUET:
            return list(_row_groups(path, piece_bytes))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"--input: {path} cannot be read ({_reason(error)})") from error
    if kind == _TEXT or compression or size == 0:
        return [(Piece(str(path), 0, size), size)]
    starts = range(0, size, piece_bytes)
    stops = [*starts[1:], size]
    return [
        (Piece(str(path), start, stop), stop - start)
        for start, stop in zip(starts, stops, strict=True)
    ]


def documents(
    piece: Piece, text_field: str, progress: Callable[[int], None] = lambda read: None
) -> Iterator[str]:
    """The texts of a piece, empty ones too; half a surrogate pair, which is no text, becomes
    U+FFFD.

    Args:
        piece: what to read.
        text_field: where JSON and Parquet have the text.
        progress: is told how many bytes of the piece have been read, now and then.

    Raises:
        UserError: the file cannot be read, is damaged, or has something without a text.
    """
    path = Path(piece.path)
    kind, compression = _format(path)
    read = {_PARQUET: _parquet, _TEXT: _text}.get(kind, _json_lines)
    try:
        yield from read(piece, compression, text_field, progress)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"--input: {path} cannot be read ({_reason(error)}); mend or remove it"
        ) from error


def _format(path: Path) -> tuple[str | None, str | None]:
    """`(kind, compression)` by the end of the name; kind None: unknown."""
    suffixes = path.suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2 if compression else -1] if len(suffixes) > bool(compression) else None
    known = (*_JSON_LINES, _TEXT) if compression else (*_JSON_LINES, _TEXT, _PARQUET)
    return (kind if kind in known else None), compression


def _row_groups(path: Path, piece_bytes: int) -> Iterator[tuple[Piece, int]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    start = size = 0
    for stop, group in enumerate(sizes, 1):
        size += group
        if size >= piece_bytes or stop == len(sizes):
            yield Piece(str(path), start, stop), size
            start, size = stop, 0


def _parquet(
    piece: Piece, compression: None, text_field: str, progress: Callable[[int], None]
) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(piece.path) as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(
                f"--text_field={text_field!r}: {piece.path} has no such column; it has {file.schema_arrow.names}"
            )
        done = 0
        for group in range(piece.start, piece.stop):
            size, rows = (
                getattr(file.metadata.row_group(group), name)
                for name in ("total_byte_size", "num_rows")
            )
            seen = 0
            for batch in file.iter_batches(
                batch_size=256, row_groups=[group], columns=[text_field]
            ):
                where = f"row group {group} of {piece.path}"
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"--input: {where} is not UTF-8 ({error.reason}); mend or remove it"
                    ) from error
                for text in texts:
                    yield _checked(text, where, text_field)
                seen += len(batch)
                progress(done + size * seen // max(rows, 1))
            done += size


def _text(
    piece: Piece, compression: str | None, text_field: str, progress: Callable[[int], None]
) -> Iterator[str]:
    with pyarrow.OSFile(piece.path) as raw:
        content = (pyarrow.CompressedInputStream(raw, compression) if compression else raw).read()
    progress(piece.stop)
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--input: {piece.path} is not UTF-8 at byte {error.start}; convert or remove it"
        ) from error


def _json_lines(
    piece: Piece, compression: str | None, text_field: str, progress: Callable[[int], None]
) -> Iterator[str]:
    with pyarrow.OSFile(piece.path) as raw:
        stream = io.BufferedReader(
            pyarrow.CompressedInputStream(raw, compression) if compression else raw, _READ_BYTES
        )
        position = piece.start
        if piece.start > 0:
            stream.seek(piece.start - 1)
            position += (
                len(stream.readline()) - 1
            )  # the line that begins before the piece belongs to the one before
        for line in stream:
            if not compression and position >= piece.stop:
                break
            if not line.isspace():
                where = f"the line at byte {position} of {piece.path}" + (
                    ", decompressed," if compression else ""
                )
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"--input: {where} is no JSON ({error}); mend or remove it"
                    ) from error
                if not isinstance(value, dict):
                    raise UserError(
                        f"--input: {where} is no JSON object; each line is one, with a field {text_field!r}"
                    )
                if text_field not in value:
                    raise UserError(
                        f"--text_field={text_field!r}: {where} has no such field; it has {list(value)}"
                    )
                yield _checked(value[text_field], where, text_field)
            position += len(line)
            progress(raw.tell() if compression else min(position, piece.stop) - piece.start)


def _checked(text: object, where: str, text_field: str) -> str:
    if not isinstance(text, str):
        raise UserError(
            f"--text_field={text_field!r}: {where} has a {type(text).__name__} there, not a text"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]

"""JSON files: read within limits, with errors that name the file; written whole or not at all."""

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from aoe_jax.errors import UserError, shown
from aoe_jax.storage.paths import file_system, is_remote
from aoe_jax.storage.retry import patiently, patiently_if_allowed, reason, refusing

_BYTES = 2**24  # the largest JSON file, by default; parsed it takes 25x the memory
_LINE_BYTES = 2**22  # the longest line of metrics


class Kind(NamedTuple):
    """A kind of value in a file: its name in error messages, and a test of a value."""

    words: str
    holds: Callable[[object], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 to 2**63", lambda v: type(v) is int and 0 <= v < 2**63)
NUMBER = Kind("a number", lambda v: type(v) is float or (type(v) is int and abs(v) < 2**63))


def or_none(kind: Kind):
    """The same kind, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def one_of(*values):
    """One of these values."""
    return Kind(f"one of {list(values)}", lambda value: value in values)


def matching(pattern, words):
    """A text that a compiled regular expression matches as a whole."""
    return Kind(words, lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)))


def open_regular(path: Path | str):
    """Opens a regular file for reading bytes; raises OSError for a FIFO or a device, at once."""
    if is_remote(path):
        return io.BufferedReader(file_system(path).open(os.fspath(path), "rb"))
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is a FIFO or a device, not a regular file", str(path))


def read_regular(path: Path | str, at_most: int) -> bytes:
    """The bytes of a regular file; raises OSError, also if it has more than `at_most`."""
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EINVAL, f"it has more than {at_most} bytes", str(path))
    return content


def read_text(path: Path, name: str, at_most: int) -> str:
    """The text of a regular file in UTF-8. Raises `UserError`, whose message begins with `name`."""
    what = f"{name} cannot be read"
    try:
        return patiently_if_allowed(what, lambda: read_regular(path, at_most)).decode("utf-8")
    except OSError as e:
        raise UserError(f"{what} ({reason(e)}); name a text file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 at byte {e.start}; convert or remove it") from e


def read_json(
    path: Path, wanted="name the workdir of a training run", schema=None, at_most: int = _BYTES
):
    """The JSON object in a file. Raises `UserError`, whose message ends with `wanted`, if the file
    cannot be read, has more than `at_most` bytes, or does not have the schema.

    A schema is a `Kind`; `[schema]`, a list of values of a schema; `{name: schema}`, an object with
    at least these fields, where null stands for a missing one; or `{str: schema}`, an object with
    any fields of a schema.
    """

    def read():
        try:
            return read_regular(path, at_most)
        except PermissionError as e:  # waiting does not help
            raise UserError(f"{path} cannot be read ({reason(e)}); {wanted}") from e

    try:
        value = json.loads(patiently(f"{path} cannot be read", read))
    except (OSError, ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else reason(e)
        raise UserError(f"{path} cannot be read ({why}); {wanted}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object; {wanted}")
    if problem := misfit(value, schema or {}):
        raise UserError(f"{path} cannot be read: {problem}; {wanted}")
    return value


def misfit(value, schema, name=""):
    """Says how the first part that does not fit the schema is wrong; None if all parts fit."""
    if isinstance(schema, Kind):
        return None if schema.holds(value) else f"{name} is {shown(value)}, not {schema.words}"
    if not isinstance(value, type(schema)):
        wanted = "a list" if isinstance(schema, list) else "an object"
        return f"{name} is {shown(value)}, not {wanted}"
    if isinstance(schema, list):
        parts = ((f"{name}[{i}]", part, schema[0]) for i, part in enumerate(value))
    elif str in schema:
        parts = ((f"{name}[{shown(key)}]", part, schema[str]) for key, part in value.items())
    else:
        dot = f"{name}." if name else ""
        parts = ((f"{dot}{key}", value.get(key), of_key) for key, of_key in schema.items())
    return next(filter(None, (misfit(part, of_part, name) for name, part, of_part in parts)), None)


def read_metrics(path: Path):
    """Yields the whole lines of a file of metrics that have a step; none without a file. All values
    except `layers` are numbers or null. Raises `UserError` if it cannot be read.
    """
    if not path.exists():
        return
    with refusing(f"{path} cannot be read", "; move it away"), open_regular(path) as file:
        while line := file.readline(_LINE_BYTES):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict) and _is_metrics(value):
                    yield value


def _is_metrics(line):
    numbers = [value for name, value in line.items() if name != "layers"]
    return COUNT.holds(line.get("step")) and all(v is None or NUMBER.holds(v) for v in numbers)


def write_json(path: Path, value, indent=2):
    """`write_whole` for JSON, null for numbers that are not finite."""
    write_whole(path, (json.dumps(finite(value), indent=indent) + "\n").encode())


def write_whole(path: Path, content: bytes | Iterable[bytes]):
    """Writes a file, also from pieces. A kill or a power cut leaves either the old file or the new
    one. Raises `UserError` if a folder has its name, or its name with `.partial`.
    """
    pieces = [content] if isinstance(content, bytes) else content
    if is_remote(path):  # it appears whole
        path.write_bytes(b"".join(pieces))
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # writing to a FIFO would wait, a link leads elsewhere
        with partial.open("wb") as file:
            file.writelines(pieces)
        replace_durably(partial, path)
    except OSError as e:
        for folder in (partial, path):
            if folder.is_dir():
                raise UserError(f"{folder} is a folder; move it away") from e
        raise


def finite(value):
    """The value after conversion to JSON and back, with None for numbers that are not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def replace_durably(new: Path, path: Path):
    """Moves a finished file to its place, safe from a power cut."""
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def sync(path: Path):
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network disks cannot do that for folders
            raise
    finally:
        os.close(descriptor)

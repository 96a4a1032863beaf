"""Reads and writes files and makes folders, on a disk or in an object store; makes locks on a disk.
Reading checks a size limit and a schema. An interrupted write leaves the old or the new file.
"""

import contextlib
import errno
import io
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock

from aoe_jax.errors import UserError, shown
from aoe_jax.storage.paths import file_system, is_remote, size_and_version
from aoe_jax.storage.retry import is_fault_of_write, patiently, reason, refusing

log = logging.getLogger(__name__)

_BYTES = 2**24  # default size limit of a JSON file; parsing needs 25x its size in memory
_LINE_BYTES = 2**22  # length limit of a line of metrics


class Kind(NamedTuple):
    """A kind of value in a file. `words` describes it in error messages, `holds` tests a value."""

    words: str
    holds: Callable[[object], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
COUNT = Kind("a whole number from 0 to 2**63", lambda v: type(v) is int and 0 <= v < 2**63)
NUMBER = Kind("a number", lambda v: type(v) is float or (type(v) is int and abs(v) < 2**63))


def or_none(kind: Kind):
    """Returns the `Kind` that allows values of `kind` and null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def one_of(*values):
    """Returns the `Kind` that allows `values`."""
    return Kind(f"one of {list(values)}", lambda value: value in values)


def matching(pattern, words):
    """Returns the `Kind` that allows texts which match a compiled `pattern` completely."""
    return Kind(words, lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)))


def open_file(path: Path | str):
    """Opens a file on a disk or in a store for reading bytes."""
    if is_remote(path):
        return io.BufferedReader(file_system(path).open(os.fspath(path), "rb"))
    return open(path, "rb")


def read_bytes(path: Path | str, at_most: int) -> bytes:
    """The bytes of a file. Raises `OSError` if it cannot be read or has over `at_most` bytes."""
    if size_and_version(path)[0] > at_most:
        raise OSError(errno.EINVAL, f"it has more than {at_most} bytes", str(path))
    return file_system(path).cat_file(os.fspath(path))


def read_text(path: Path, name: str, at_most: int) -> str:
    """The text of a UTF-8 file. Raises `UserError`, beginning with `name`, if it cannot be read."""
    what = f"{name} cannot be read"
    with refusing(what, "; name a text file"):
        content = patiently(what, lambda: read_bytes(path, at_most))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is not UTF-8 at byte {e.start}; convert or remove it") from e


def read_json(
    path: Path, wanted="name the workdir of a training run", schema=None, at_most: int = _BYTES
):
    """The JSON object in a file. Raises `UserError`, whose message ends with `wanted`, if the file
    cannot be read, has more than `at_most` bytes, or does not match the schema.

    A schema has one of four forms. A `Kind` describes a single value. `[schema]` describes a list
    whose items all have that schema. `{str: schema}` describes an object whose values all have that
    schema. `{name: schema}` describes an object with these and other fields; a missing one is null.
    """
    what = f"{path} cannot be read"
    try:
        value = json.loads(patiently(what, lambda: read_bytes(path, at_most)))
    except UserError as e:
        raise UserError(f"{e}; {wanted}") from e
    except (OSError, ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else reason(e)
        raise UserError(f"{what} ({why}); {wanted}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object; {wanted}")
    if problem := misfit(value, schema or {}):
        raise UserError(f"{path} cannot be read: {problem}; {wanted}")
    return value


def misfit(value, schema, name=""):
    """Describes the first value that does not match the schema; None if all values match."""
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
    """Yields the valid lines of a `metrics.jsonl`, if it exists, as dicts. A valid line has a step,
    and its values, except `layers`, are numbers or null. Raises `UserError` if reading fails.
    """
    if not path.exists():
        return
    with refusing(f"{path} cannot be read", "; move it away"), open_file(path) as file:
        while line := file.readline(_LINE_BYTES):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                problem = misfit(value, {"step": COUNT})
                if not (problem or misfit(value | {"layers": None}, {str: or_none(NUMBER)})):
                    yield value


def write_json(path: Path, value, indent=2):
    """Writes JSON with `write_whole`; numbers that are not finite become null."""
    write_whole(path, (json.dumps(finite(value), indent=indent) + "\n").encode())


def write_whole(path: Path, content: bytes):
    """Writes a file. A kill or a power cut leaves either the old file or the new file."""
    if is_remote(path):  # a store shows an object only when it is complete
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # it still exists after an error
    sync(path.parent)


def finite(value):
    """Converts a value to JSON and back; numbers that are not finite become None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def sync(path: Path):
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network disks do not support fsync of folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path, flag: str):
    """Makes a folder. Raises `UserError` if it cannot be made, `MachineFault` if its disk fails."""
    exists = folder.exists() if is_remote(folder) else os.path.lexists(folder)
    if exists and not folder.is_dir():
        raise UserError(f"--{flag}={folder} is a file or a broken link; name a folder")
    if not is_remote(folder):  # a store needs no folders, and mkdir would make the bucket
        write_or_refuse(folder, flag, lambda: folder.mkdir(parents=True, exist_ok=True))


def write_or_refuse(folder, flag, write):
    """Returns `write()`, repeated after temporary faults. Other `OSError`s become `UserError`s."""

    def attempt():
        try:
            return write()
        except FileNotFoundError as e:
            if is_remote(folder):
                bucket = "/".join(os.fspath(folder).split("/")[:3])
                raise UserError(f"--{flag}={folder}: there is no bucket {bucket}") from e
            # The folder existed before, so this error is a fault of the disk.
            raise OSError(errno.ESTALE, "it is gone; is its disk mounted?") from None
        except OSError as e:
            if is_fault_of_write(e):
                raise
            raise UserError(f"--{flag}={folder} cannot be written: {reason(e)}") from e

    return patiently(f"--{flag}={folder} cannot be written", attempt)


def write_report(file: Path, report: dict, flag):
    """Writes a report as JSON. Raises `UserError`, which names the `flag` of its folder, if the
    folder is read-only, and `MachineFault` if its disk fails.
    """
    write_or_refuse(file.parent, flag, lambda: write_json(file, report))
    log.info("wrote %s", file)


@contextlib.contextmanager
def exclusive(lock_file: Path, flag="config.data.cache"):
    """A context that holds a lock until the context or the process ends; on some network disks only
    among the processes of a host. If the file's folder cannot be written, raises a `UserError` that
    names `flag`.
    """

    def acquire():
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(lock_file).acquire()

    with write_or_refuse(lock_file.parent, flag, acquire):
        yield

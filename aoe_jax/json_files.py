"""Small JSON files: written whole or not at all, read with errors that name the file."""

import contextlib
import errno
import json
import os
from pathlib import Path

from aoe_jax.errors import UserError
from aoe_jax.paths import is_remote


def read_json(path: Path, wanted="name the workdir of a training run"):
    """The JSON object in a file.

    Raises:
      UserError: the file can't be read, or holds something else; ends with what is `wanted`.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"{path} can't be read ({reason}); {wanted}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} can't be read: it holds no JSON object; {wanted}")
    return value


def read_metrics(path: Path):
    """Yields the lines of a file of metrics, if it exists, that are whole and have a step."""
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                yield value


def write_json(path: Path, value, indent=2):
    """Writes JSON, null for numbers that aren't finite; a kill or a power cut leaves either the old
    file or the new one.
    """
    text = json.dumps(finite(value), indent=indent) + "\n"
    if is_remote(path):  # it appears whole
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    replace_durably(partial, path)


def finite(value):
    """The value as JSON gives it back, with None for numbers that aren't finite."""
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
        if e.errno != errno.EINVAL:  # some network disks can't do that for folders
            raise
    finally:
        os.close(descriptor)

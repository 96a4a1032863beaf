"""Small JSON files: written whole or not at all, read with errors that name the file."""

import json
import os
from pathlib import Path

from aoe_jax.errors import UserError


def read_json(path: Path, wanted="name the workdir of a training run"):
    """The JSON object in a file.

    Raises:
      UserError: it can't be read, or holds something else; ends with what is `wanted`.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror}); {wanted}") from e
    except ValueError as e:
        raise UserError(f"{path} can't be read ({e}); {wanted}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} can't be read: it holds no JSON object; {wanted}")
    return value


def write_json(path: Path, value):
    """Writes JSON so that a kill leaves the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)

"""The library imports no I/O, no flags, no threads, and nothing from beyond the wall."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("moe", "methods", "model", "config")
MODULES = ("errors", "layers", "parameters", "sharding")
FILES = sorted(
    [ROOT / f"aoe_jax/{name}.py" for name in MODULES]
    + [file for room in ROOMS for file in (ROOT / "aoe_jax" / room).rglob("*.py")]
)
FORBIDDEN = ("absl", "etils", "fsspec", "ml_collections", "orbax", "pathlib", "threading")


def imports(file):
    """The names that a file imports, as `package.module`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_from_beyond_the_wall(file):
    for name in imports(file):
        parts = name.split(".")
        assert parts[0] not in FORBIDDEN, name
        if parts[0] == "aoe_jax":
            assert len(parts) > 1 and parts[1] in (*ROOMS, *MODULES), name

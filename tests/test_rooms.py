"""The packages beyond the library stand on each other in one order: no circle, no arrow upward."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "aoe_jax"
# From below, as docs/architecture.md has them.
ROOMS = [
    "storage",
    "data",
    "formats",
    "training",
    "evaluation",
    "conversion",
    "planning",
    "compare",
]


def imported(file):
    """The packages of aoe_jax that a file imports from, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aoe_jax"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}".split(".")[1]


def test_imports_go_downward():
    for height, room in enumerate(ROOMS):
        for file in (PACKAGE / room).rglob("*.py"):
            above = {*imported(file)} & {*ROOMS[height + 1 :]}
            assert not above, f"{file} imports from {', '.join(above)}"


def test_the_page_has_the_same_order():
    page = (PACKAGE.parent / "docs/architecture.md").read_text().partition("## Rooms")[2]
    places = [page.index(f"`aoe_jax/{room}`") for room in ROOMS]
    assert places == sorted(places)

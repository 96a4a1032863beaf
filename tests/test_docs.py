"""Names in the documentation exist, its commands can be parsed, and its Python code runs."""

import importlib.util
import re
import tomllib
from pathlib import Path

import griffe
import jax
import numpy as np
import pytest

from aoe_jax.errors import UserError
from tests.command_lines import check, commands_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("results/*.md"))]
PYTHON = {
    str(page.relative_to(ROOT)): blocks
    for page in PAGES
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def commands_of_all_pages():
    """Returns `{program: lines of arguments}`."""
    found = {}
    for page in PAGES:
        for program, arguments in commands_of(page.read_text()):
            found.setdefault(program, set()).add(arguments)
    return {program: sorted(lines) for program, lines in found.items()}


COMMANDS = commands_of_all_pages()
FIELDS = """
class Group:
    one: int = 1  # behind it
    # Above it,
    # in two lines.
    two: int = 2

    three: int = 3
    four: int = 4
    'Its own.'
"""


def links_of(page):
    """The files that a page links to."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            yield (page.parent / target).resolve()


def test_names_of_the_walk_exist():
    """Every `name` in docs/architecture.md is defined in the package, and every file exists."""
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(text.partition("## Rooms")[0].splitlines()) <= 60
    code = "\n".join(path.read_text() for path in ROOT.glob("aoe_jax/**/*.py"))
    for name in re.findall(r"`([^`\s]+)`", text):
        if "/" in name or name.endswith(".py"):
            assert (ROOT / name).exists(), name
            continue
        last = name.rpartition(".")[2]
        defined = rf"(def|class) {last}\b|\b{last}: |\b{last} = |\"{last}\""
        assert re.search(defined, code), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page):
    """Links to files exist; only `make docs` checks anchors too."""
    for target in links_of(page):
        assert target.exists(), target


def test_every_page_is_two_clicks_from_the_readme():
    near = {ROOT / "README.md"}
    for _ in range(2):
        near |= {target for page in near if page.suffix == ".md" for target in links_of(page)}
    assert set(PAGES) <= near


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_name_files_that_exist(page):
    text = page.read_text()
    for file in set(re.findall(r"\bconfigs/[\w/]+\.py", text)):
        assert (ROOT / file).exists(), file
    for target in re.findall(r"^    make (\w+)|`make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for script in re.findall(r"`(aoe-\w+)", text):
        assert f"\n{script} = " in (ROOT / "aoe_jax/commands.ini").read_text(), script
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"pip install '(?:\.|aoe_jax)\[(\w+)\]'", text):
        assert extra in extras["optional-dependencies"], extra


@pytest.mark.slow
@pytest.mark.parametrize("program", COMMANDS)
def test_commands_parse(program):
    """The program's flags parse each line, and configurations are checked; no command is run."""
    if not any(COMMANDS[program]):
        is_there = (ROOT / program).exists() or importlib.util.find_spec(program)
        assert is_there, program
        return
    check(program, COMMANDS[program])


@pytest.mark.slow
def test_a_wrong_command_does_not_parse():
    for arguments in ("--workdri=DIR", "--config=configs/tiny.py --config.experts.top_k=9"):
        with pytest.raises(UserError):
            check("train.py", ["--workdir=DIR", arguments])


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs(page, ragged):
    """All blocks of a page run one after the other, and all arrays that they make are finite."""
    names = {"__name__": "__main__"}
    for block in PYTHON[page]:
        exec(compile(block, page, "exec"), names)
    arrays = [a for a in jax.tree.leaves(list(names.values())) if isinstance(a, jax.Array)]
    numbers = [a for a in arrays if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]
    assert all(np.isfinite(a).all() for a in numbers)


def test_comments_document_fields():
    """The API reference shows the comments of fields as documentation."""
    extensions = griffe.load_extensions(ROOT / "docs/comments_as_docstrings.py")
    with griffe.temporary_visited_module(FIELDS, extensions=extensions) as module:
        fields = module["Group"].attributes.values()
        found = {field.name: field.docstring and field.docstring.value for field in fields}
    assert found == {
        "one": "behind it",
        "two": "Above it, in two lines.",
        "three": None,
        "four": "Its own.",
    }


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160

"""What the documentation names exists, and its Python code runs."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]


def test_names_of_the_walk_exist():
    """Every `name` of docs/architecture.md is defined in the package, every file is there."""
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(text.splitlines()) <= 60
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
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_name_modules_and_files_that_exist(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m ([\w.]+)", text)) - {"benchmarks.NAME"}:
        assert importlib.util.find_spec(module), module
    for file in set(re.findall(r"\bconfigs/[\w/]+\.py", text)):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_code_runs(page, ragged):
    """All blocks of a page, one after the other."""
    blocks, names = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL), {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    for name in ("y", "loss", "aux", "grads", "products", "attended"):
        assert page == "README.md" or name in names
        for a in jax.tree.leaves(names.get(name)):
            assert np.isfinite(a).all()


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160

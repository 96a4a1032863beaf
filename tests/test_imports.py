"""The library imports no other folder of the package and no I/O; folders import only lower ones."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from aoe_jax.__main__ import commands

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aoe_jax"
LIBRARY = {"moe", "methods", "model", "config", "layers", "nnx", "parameters", "sharding", "errors"}
# Folders of the package in order. A file may import from its own group and from earlier groups.
ROOMS = (
    LIBRARY | {"__init__"},
    {"storage"},
    {"distributed", "cluster"},
    {"cli"},
    {"data"},
    {"formats"},
    {"training"},
    {"evaluation"},
    {"conversion"},
    {"planning"},
    {"compare"},
    {"__main__"},
)
OUTSIDE = {  # I/O, flags and threads
    *("absl", "concurrent", "etils", "filelock", "fsspec", "gcsfs", "ml_collections"),
    *("multiprocessing", "orbax", "s3fs", "socket", "subprocess", "tensorstore", "threading"),
}
COMMANDS = {name.removeprefix("aoe_jax.").partition(".")[0] for _, name, _ in commands()}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """Returns the folder of a module, or the name of a module outside folders."""
    return [*module.split("."), "__init__"][1]


def imports_of(file):
    """Yields the modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path = ROOT / Path(*name.split("."))
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield name if is_module else node.module


def arrows():
    """Lists `(importing module, imported module)` within the package."""
    return [
        (module_of(file), name)
        for file in files()
        for name in imports_of(file)
        if name.partition(".")[0] == "aoe_jax"
    ]


def height_of(module):
    room = room_of(module)
    found = [i for i, rooms in enumerate(ROOMS) if room in rooms]
    return found[0] if found else len(ROOMS)  # a command


def test_rooms_import_only_rooms_below_and_nothing_imports_a_command():
    entry = {name for _, name, _ in commands()}
    wrong = [(a, b) for a, b in arrows() if height_of(a) < height_of(b) or b in entry]
    assert wrong == [("aoe_jax.finetune", "aoe_jax.train")]  # the same command


def test_only_the_registry_imports_methods():
    """So each can be removed, except "dense", which is a layer of the library."""
    found = {name for module, name in arrows() if room_of(module) != "methods"}
    assert {n for n in found if n.startswith("aoe_jax.methods.")} == {"aoe_jax.methods.dense"}


def test_the_library_has_no_io():
    library = [file for file in files() if room_of(module_of(file)) in LIBRARY]
    imported = {name.partition(".")[0] for file in library for name in imports_of(file)}
    assert imported & OUTSIDE == set()


def test_the_page_has_the_rooms_in_this_order():
    page = (ROOT / "docs/architecture.md").read_text().partition("## Rooms")[2]
    rooms = [room for named in ROOMS[1:] for room in named if (PACKAGE / room).is_dir()]
    places = [page.index(f"`aoe_jax/{room}`") for room in rooms]
    assert places == sorted(places)


def test_there_is_no_circle():
    graph = {}
    for module, name in arrows():
        graph.setdefault(module, set()).add(name)
    while leaves := [m for m in graph if not graph[m] & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


def test_the_top_of_the_package_has_commands_and_ten_other_modules():
    top = {file.stem for file in PACKAGE.glob("*.py")}
    wanted = {"__init__", "__main__", "cli", "distributed", "errors", "layers", "nnx", "parameters"}
    assert top - COMMANDS <= wanted | {"cluster", "sharding"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "configs"} <= set().union(*ROOMS)


CODE = """
import importlib, pkgutil
import aoe_jax, configs

for package in (aoe_jax, configs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
        if "flags.DEFINE" not in source:  # commands cannot be imported together
            importlib.import_module(module.name)

from aoe_jax.config.run import Config
from configs import large, methods, paper, tiny

for module in (large, methods, paper, tiny):
    for variant in module.VARIANTS:
        Config.from_config_dict(module.get_config(variant))
print("no backend so far", flush=True)
import jax
jax.numpy.zeros(1)
"""


def test_no_backend_is_started():
    """Imports and configurations start no JAX backend, so `jax.distributed.initialize` can run."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "no backend so far\n", done.stderr
    assert done.returncode == 1 and "Unable to initialize backend" in done.stderr

"""Imports start no backend of JAX: `jax.distributed.initialize` has to come first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import importlib, pkgutil
import aoe_jax, configs
from jax._src import xla_bridge

for package in (aoe_jax, configs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
        if "flags.DEFINE" not in source:  # commands cannot be imported together
            importlib.import_module(module.name)
        assert not xla_bridge.backends_are_initialized(), module.name
"""


def test_imports_start_no_backend():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

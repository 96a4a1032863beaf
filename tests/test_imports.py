"""Neither imports nor configurations start a backend of JAX: `jax.distributed.initialize` has to
come first.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import importlib, pkgutil
import aoe_jax, configs

for package in (aoe_jax, configs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
        if "flags.DEFINE" not in source:  # commands cannot be imported together
            importlib.import_module(module.name)

from aoe_jax.config.run import Config
from configs import methods, paper

for module in (methods, paper):
    for variant in module.VARIANTS:
        Config.from_config_dict(module.get_config(variant))
"""


def status_and_errors(code):
    """Of Python code where a backend cannot start, since JAX is told to use one that is unknown."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_no_backend_is_started():
    status, errors = status_and_errors(CODE)
    assert status == 0, errors
    status, errors = status_and_errors("import jax; jax.numpy.zeros(1)")
    assert status == 1 and "Unable to initialize backend" in errors

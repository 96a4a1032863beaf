"""Neither imports nor configurations start a backend of JAX: `jax.distributed.initialize` has to
come first.
"""

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

from aoe_jax.config.run import Config
from configs import methods, paper

for module in (methods, paper):
    for variant in module.VARIANTS:
        Config.from_config_dict(module.get_config(variant))
        assert not xla_bridge.backends_are_initialized(), variant
"""


def test_no_backend_is_started():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""Reads configurations, from Python files that a user writes or from the `config.json` of a run."""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import fsspec
from ml_collections import ConfigDict

from aoe_jax.config.checks import require
from aoe_jax.config.model import ModelConfig
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError, naming, running
from aoe_jax.storage.files import read_json
from aoe_jax.storage.paths import is_remote, parsed_path

EXAMPLE = "configs/tiny.py of the repository"


def default_config():
    """Returns the default configuration as a `ConfigDict`, which `configs/*.py` change. Its group
    `routing` is empty, which selects the default routing method of `experts.kind`.
    """
    model = dataclasses.asdict(ModelConfig())  # without the `vocab_size` that `Config` sets
    return ConfigDict(dataclasses.asdict(Config()) | {"model": model, "routing": {}})


def update_groups(config, changes):
    """Applies `changes`, `{group: {field: value}}`. A group `routing` replaces the old one."""
    if "routing" in changes:
        config.routing = ConfigDict()
    config.update(changes)


def read_config(name: str) -> dict:
    """Reads `FILE.py`, `FILE.py:VARIANT` or a run's `config.json` as `{group: {field: value}}`. The
    values in a Python file are not checked. Raises `UserError` if the file cannot be read.
    """
    scheme, slashes, rest = name.rpartition("://")
    file, _, variant = rest.partition(":")
    file = parsed_path(f"{scheme}{slashes}{file}", "--config", in_store=True)
    if is_remote(file) and file.exists():
        file = Path(fsspec.open_local(f"simplecache::{file}", simplecache={"same_names": True}))
    if file.suffix == ".json" and not variant:
        return read_run_config(file).to_dict()
    config = call_in_file(f"--config={name}", file, "get_config", *filter(None, [variant]))
    wanted = "start from default_config()"
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config() must return a ConfigDict; {wanted}")
    for group, values in config.items():
        is_group = isinstance(values, ConfigDict)
        require(is_group, group, values, f"must be a group of fields; {wanted}")
    return config.to_dict()


def read_run_config(path: Path) -> Config:
    """Reads the configuration of a run, `config.json`, of this or an earlier version. Raises
    `UserError` if the file cannot be read, or belongs to a model instead of a run.
    """
    groups = read_json(path)
    if "model_type" in groups:
        wanted = "train.init_from starts a run from a model"
        raise UserError(f"{path} belongs to a model, not to a training run; {wanted}")
    with naming(path):
        return Config.from_stored(groups)


def call_in_file(flag, file, function, *args):
    """Calls a function in a Python file that the user has written, and returns its result. Raises
    `UserError`, whose message begins with `flag`, such as `--config=FILE`, if the file or the
    function is missing, or the function raises an exception.
    """
    if not Path(file).is_file():
        example = EXAMPLE if function == "get_config" else "configs/compare/tiny.py"
        wanted = f"name a Python file with {function}(), such as {example}"
        raise UserError(f"{flag}: cannot be read (no such file); {wanted}")
    if os.getcwd() not in sys.path:  # console scripts do not add the current folder
        sys.path.append(os.getcwd())
    with running(flag, file, f"{function}()"):
        found = runpy.run_path(str(file))
        if function not in found:
            raise UserError(f"{flag}: has no function {function}()")
        return found[function](*args)

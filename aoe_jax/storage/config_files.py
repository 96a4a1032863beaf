"""Reads configurations, from Python files that a user writes or from the `config.json` of a run."""

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import fsspec
from ml_collections import ConfigDict

from aoe_jax.config.checks import choose, require
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError, naming, running
from aoe_jax.storage.files import read_json
from aoe_jax.storage.paths import is_remote, parsed_path

_SHIPPED = Path(__file__).parents[1] / "configs"


def default_config():
    """Returns the default configuration as a `ConfigDict`, which `configs/*.py` change. Its group
    `routing` is empty, which selects the default routing method of `experts.kind`.
    """
    groups = {f.name: dataclasses.asdict(f.default_factory()) for f in dataclasses.fields(Config)}
    return ConfigDict(groups | {"routing": {}})


def require_variant(file, variant, variants, wanted=""):
    """Raises `UserError` if a file of `configs/` has no such variant."""
    if variant not in variants:
        wanted += choose(variant, variants)
        raise UserError(f"{file}:{variant or ''} is no variant; {wanted}")


def update_groups(config, changes):
    """Applies `changes`, `{group: {field: value}}`. A group `routing` replaces the old one."""
    if "routing" in changes:
        config.routing = ConfigDict()
    config.update(changes)


def read_config(name: str) -> dict:
    """Reads `FILE.py`, `FILE.py:VARIANT`, `aoe_jax:NAME`, `aoe_jax:NAME:VARIANT` or a run's
    `config.json` as `{group: {field: value}}`. The values in a Python file are not checked. Raises
    `UserError` if the file cannot be read.
    """
    scheme, slashes, rest = shipped("--config", name).rpartition("://")
    file, _, variant = rest.partition(":")
    file = parsed_path(f"{scheme}{slashes}{file}", "--config", in_store=True)
    if is_remote(file) and file.exists():
        file = Path(fsspec.open_local(f"simplecache::{file}", simplecache={"same_names": True}))
    if file.suffix == ".json" and not variant:
        return read_run_config(file).to_dict()
    flag = f"--config={name}"
    config = call_in_file(flag, file, "get_config", *filter(None, [variant]))
    wanted = "start from default_config()"
    if not isinstance(config, ConfigDict):
        raise UserError(f"{flag}: get_config() must return a ConfigDict; {wanted}")
    for group, values in config.items():
        is_group = isinstance(values, ConfigDict)
        require(is_group, group, values, f"must be a group of fields; {wanted}")
    with running(flag, file, "get_config()"):
        return config.to_dict()


def shipped(flag, name, folder=""):
    """Replaces `aoe_jax:NAME` by the path of the file NAME.py in `configs/FOLDER`. Raises
    `UserError` if there is no such file.
    """
    package, _, rest = name.partition(":")
    if package != "aoe_jax":
        return name
    stem, colon, variant = rest.partition(":")
    known = sorted(file.stem for file in (_SHIPPED / folder).glob("*.py"))
    if stem not in known:
        raise UserError(f"{flag}={name}: {choose(stem, known)}")
    return f"{_SHIPPED / folder / stem}.py{colon}{variant}"


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
        wanted = f"name a Python file with {function}(), or a file of this package: aoe_jax:tiny"
        raise UserError(f"{flag}: cannot be read (no such file); {wanted}")
    if os.getcwd() not in sys.path:  # console scripts do not add the current folder
        sys.path.append(os.getcwd())
    with running(flag, file, f"{function}()"):
        found = runpy.run_path(str(file))
        if function not in found:
            raise UserError(f"{flag}: has no function {function}()")
        return found[function](*args)

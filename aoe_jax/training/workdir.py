"""The directory of a run: which configuration and data it belongs to."""

import logging
import shutil
from pathlib import Path

from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import TokenisedCorpus
from aoe_jax.errors import UserError
from aoe_jax.json_files import read_json, write_json

log = logging.getLogger(__name__)

# Fields and groups that may change when a run continues: they don't affect what it computes, but
# for how long it runs.
FREE_FIELDS = {
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "data.cache",
    "data.path",
    "model.unroll",
}
FREE_GROUPS = {"checkpoint", "mesh"}


def _flat(config):
    # Corpora go without their paths, for a corpus may move.
    groups = config.to_dict()
    groups["data"] |= {"name": config.data.name_without_paths}
    return {
        f"{group}.{name}": value
        for group, values in groups.items()
        for name, value in values.items()
    }


def check_workdir(workdir: Path, config: Config):
    """Checks that `workdir` is free or holds a run of this configuration; writes nothing.

    Raises:
      UserError: it is a file, or holds a run of another configuration.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    path = workdir / "config.json"
    if not path.exists():
        return
    found, wanted = _flat(read_run_config(path)), _flat(config)
    differing = [
        f"{name} is {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
        and name not in FREE_FIELDS
        and name.split(".")[0] not in FREE_GROUPS
    ]
    if differing:
        raise UserError(
            f"workdir {workdir} holds another configuration: {'; '.join(differing)}. Use another "
            "--workdir"
        )


def check_data(workdir: Path, corpus: TokenisedCorpus):
    """Checks that a run in `workdir` reads these token stores; writes nothing.

    Raises:
      UserError: a text or the tokenizer has changed since the run began.
    """
    path = workdir / "data.json"
    if not path.exists():
        return
    found = read_json(path).get("token_stores")
    if found != corpus.identities:
        there, here = (", ".join(stores or ["none"]) for stores in (found, corpus.identities))
        raise UserError(
            f"workdir {workdir} was trained on token store {there}, this is {here}: the text or "
            "the tokenizer has changed. Bring the old text back (data.path, or the paths in "
            "data.name), or use another --workdir"
        )


def make_workdir(workdir: Path):
    """Makes the directory if it does not exist.

    Raises:
      UserError: it can't be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir={workdir} can't be written: {e.strerror}") from e


def claim_workdir(workdir: Path, config: Config, corpus: TokenisedCorpus):
    """Writes `config.json`, `data.json` and a copy of the tokenizer; call it after all checks.

    Raises:
      UserError: the directory can't be written.
    """
    try:
        shutil.copyfile(corpus.tokenizer, workdir / corpus.tokenizer.name)
        write_json(workdir / "data.json", {"token_stores": corpus.identities})
        write_json(workdir / "config.json", config.to_dict())
    except OSError as e:
        raise UserError(f"--workdir={workdir} can't be written: {e.strerror}") from e


def read_run_config(path: Path) -> Config:
    """The configuration of a run, from its `config.json`.

    Raises:
      UserError: the file can't be read, or is no configuration of a training run, or one of an
        earlier version with fields that have gone.
    """
    groups = read_json(path)
    if "model_type" in groups:
        raise UserError(
            f"{path} is that of a model, not of a training run; train.init_from starts a run from "
            "a model"
        )
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise UserError(
                f"{path} can't be read: {name} is no group of fields; name the workdir of a "
                "training run"
            )
    try:
        return Config.from_config_dict(groups)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e

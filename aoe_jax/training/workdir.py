"""The directory of a run: which configuration and data it belongs to."""

import shutil
from pathlib import Path

from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import TokenisedCorpus
from aoe_jax.errors import UserError
from aoe_jax.formats.configs import differences
from aoe_jax.json_files import TEXT, read_json, write_json

# Groups and fields that may change when a run continues: they don't affect what it computes, but
# for how long it runs.
FREE = {
    "checkpoint",
    "mesh",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "data.cache",
    "data.path",
    "model.attention",
    "model.unroll",
}


def _fixed(config):
    """The values by field that a run keeps; corpora without their paths, for a corpus may move."""
    groups = config.to_dict()
    groups["data"] |= {"name": config.data.name_without_paths}
    return {
        f"{group}.{name}": value
        for group, values in groups.items()
        for name, value in values.items()
        if not {group, f"{group}.{name}"} & FREE
    }


def check_workdir(workdir: Path, config: Config):
    """Raises `UserError` if `workdir` is a file, or holds a run of another configuration."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    path = workdir / "config.json"
    if not path.exists():
        return
    if differing := differences(_fixed(read_run_config(path)), _fixed(config)).values():
        raise UserError(
            f"workdir {workdir} holds another configuration: {'; '.join(differing)}. Use another "
            "--workdir"
        )


def check_data(workdir: Path, corpus: TokenisedCorpus):
    """Raises `UserError` if the run in `workdir` reads other token stores: a text or the tokenizer
    has changed since it began.
    """
    found = read_identities(workdir) or corpus.identities
    if found != corpus.identities:
        there, here = (
            ", ".join(stores or ["none"])[:1000] for stores in (found, corpus.identities)
        )
        raise UserError(
            f"workdir {workdir} was trained on token store {there}, this is {here}: the text or "
            "the tokenizer has changed. Bring the old text back (data.path, or the paths in "
            "data.name), or use another --workdir"
        )


def read_identities(workdir: Path) -> list[str]:
    """The identities of the corpora of a run or of a model of a run; empty if it has no file."""
    path = workdir / "data.json"
    if not path.exists():
        return []
    return read_json(path, schema={"token_stores": [TEXT]})["token_stores"]


def claim_workdir(workdir: Path, config: Config, corpus: TokenisedCorpus):
    """Writes `config.json`, `data.json` and a copy of the tokenizer; call it after all checks.

    Raises `UserError` if the directory can't be written.
    """
    try:
        shutil.copyfile(corpus.tokenizer, workdir / corpus.tokenizer.name)
        write_json(workdir / "data.json", {"token_stores": corpus.identities})
        write_json(workdir / "config.json", config.to_dict())
    except OSError as e:
        raise UserError(f"--workdir={workdir} can't be written: {e.strerror}") from e


def read_run_config(path: Path) -> Config:
    """The configuration of a run, from its `config.json`.

    Raises `UserError` if the file can't be read, is no configuration of a training run, or is one
    of an earlier version with fields that have gone.
    """
    groups = read_json(path)
    if "model_type" in groups:
        raise UserError(
            f"{path} is that of a model, not of a training run; train.init_from starts a run from "
            "a model"
        )
    for name, values in groups.items():
        if not isinstance(values, dict):
            wanted = "is no group of fields; name a training run's workdir"
            raise UserError(f"{path}: {name[:100]} {wanted}")
    try:
        return Config.from_config_dict(groups)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e

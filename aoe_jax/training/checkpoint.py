"""Orbax checkpoints of model state and data position together, and the identity of a workdir."""

import json
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from aoe_jax.config import CheckpointConfig, Config
from aoe_jax.data import TokenisedCorpus
from aoe_jax.errors import UserError

# What may differ when a run goes on: how long it runs and how it reports, not what it computes.
FREE_FIELDS = {"train.steps", "train.log_every", "train.eval_every", "data.cache", "data.path", "model.unroll"}
FREE_GROUPS = {"checkpoint", "mesh"}


def _flat(config):
    """Every field by its name; corpora without their paths, for a corpus may move."""
    groups = config.to_dict()
    groups["data"] |= {"name": config.data.name_without_paths}
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def check_workdir(workdir: Path, config: Config):
    """Checks that `workdir` is free or belongs to the same configuration; writes nothing.

    Raises:
      UserError: it is a file, or a run of another configuration.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a directory")
    path = workdir / "config.json"
    if not path.exists():
        return
    found, wanted = _flat(Config.from_config_dict(read_config_json(path))), _flat(config)
    differing = [
        f"{name} is {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name) and name not in FREE_FIELDS and name.split(".")[0] not in FREE_GROUPS
    ]
    if differing:
        raise UserError(f"workdir {workdir} holds another configuration: {'; '.join(differing)}. Use another --workdir")


def check_data(workdir: Path, corpus: TokenisedCorpus):
    """Checks that the run in `workdir`, if any, read these token stores; writes nothing.

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
            f"workdir {workdir} was trained on token store {there}, this is {here}: the text or the tokenizer has changed. "
            "Bring the old text back (data.path, or the paths in data.name), or use another --workdir"
        )


def claim_workdir(workdir: Path, config: Config, corpus: TokenisedCorpus):
    """Writes `config.json`, `data.json` and a copy of the tokenizer; call it when all that can be wrong is checked.

    Raises:
      UserError: the directory can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus.tokenizer, workdir / "tokenizer.json")
        write_json(workdir / "data.json", {"token_stores": corpus.identities})
        write_json(workdir / "config.json", config.to_dict())
    except OSError as e:
        raise UserError(f"--workdir={workdir} can't be written: {e.strerror}") from e


def read_config_json(path: Path):
    """The nested dict of a `config.json`; UserError if it can't be read."""
    groups = read_json(path)
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise UserError(f"{path} can't be read: {name} is no group of fields; name the workdir of a training run")
    return groups


def read_json(path: Path):
    """The JSON object in a file of a workdir; UserError if it can't be read."""
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror}); name the workdir of a training run") from e
    except ValueError as e:
        raise UserError(f"{path} can't be read ({e}); name the workdir of a training run") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} can't be read: it holds no JSON object; name the workdir of a training run")
    return value


def write_json(path: Path, value):
    """Writes JSON so that a kill leaves the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None):
        """Opens `workdir/checkpoints`; without a configuration, for reading only: then nothing is made there."""
        self.directory = workdir.absolute() / "checkpoints"
        self._every = config.every if config else None
        self._manager = None
        if config is None and not self.directory.is_dir():
            return
        options = ocp.CheckpointManagerOptions(read_only=True)
        if config is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("state", "data"),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self):
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step() if self._manager else None

    def due(self, step):
        """Whether `checkpoint.every` asks for a checkpoint of `step`."""
        return step % self._every == 0

    def save(self, step, state, data_iterator):
        """Saves in the background; returns as soon as `state` may be donated.

        The position of the data is a number of batches and what they held of each source, the same in every process.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_iterator.get_state())
            ),
            force=True,  # `due` decides
        )

    def restore(self, step, abstract_state, data_iterator):
        """State, straight into the shardings of `abstract_state`, and the data iterator moved to its position."""
        items = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        restored = self._restore(step, items)
        data_iterator.set_state(restored["data"])
        data_iterator.start_prefetch()
        return restored["state"]

    def restore_model(self, step, abstract_state):
        """What evaluation needs of a state: `(params, selection_bias)`."""
        item = {"params": abstract_state.params, "selection_bias": abstract_state.selection_bias}
        item = {name: abstract for name, abstract in item.items() if abstract is not None}
        restore_args = jax.tree.map(lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, dtype=a.dtype), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        path = self.directory / str(step) / "state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            model = self._readable(step, lambda: checkpointer.restore(path, args=args))
        return model["params"], model.get("selection_bias")

    def _restore(self, step, items):
        return self._readable(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))

    def _readable(self, step, restore):
        try:
            return restore()
        except Exception as e:  # Orbax, tensorstore and the file system each raise kinds of their own
            root = e
            while root.__cause__:
                root = root.__cause__
            reason = (str(root).strip().splitlines() or [type(root).__name__])[0][:300]
            raise UserError(
                f"checkpoint {self.directory / str(step)} can't be read: {reason}\n"
                "Move that folder away to go on from the checkpoint before it, if there is one."
            ) from e

    def close(self):
        """Waits for what is being saved."""
        if self._manager:
            self._manager.wait_until_finished()
            self._manager.close()

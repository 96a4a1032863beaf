"""The content of a checkpoint beside its arrays, and reading and checking of both."""

import hashlib
import json
import os
from functools import partial

import jax
import orbax.checkpoint as ocp

from aoe_jax.distributed import all_agree, together
from aoe_jax.errors import Failure, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, Kind, misfit, or_none, read_regular
from aoe_jax.storage.paths import is_remote
from aoe_jax.training.fingerprints import by_path, fingerprints

_RUN_BYTES = 2**24  # the largest file beside the state
_ARRAY = Kind(
    "a shape, a dtype and a fingerprint", lambda value: isinstance(value, list) and len(value) == 3
)
PROGRESS = {
    "loss": or_none(NUMBER),
    "nll": or_none(NUMBER),
    "validated": Kind("true or false", lambda value: isinstance(value, bool)),
    "skipped_in_row": COUNT,
}
_RUN = {
    "data": {},
    "progress": PROGRESS,
    "arrays": {str: _ARRAY},
    "sha256": TEXT,
}
# Orbax raises any exception for other content.
_OF_ORBAX = {
    "state/_METADATA": {
        "tree_metadata": {
            str: {"key_metadata": [{"key": TEXT}], "value_metadata": {"value_type": TEXT}}
        }
    },
    "state/array_metadatas/process_*": {
        "array_metadatas": [
            {"array_metadata": {"param_name": TEXT, "write_shape": [COUNT], "chunk_shape": [COUNT]}}
        ]
    },
}


class Damaged(Failure):
    """A checkpoint lacks files or differs from what was saved; the message says how."""


def beside_arrays(arrays, data_state, progress: dict) -> dict:
    """The content of a checkpoint beside the `arrays` of its state, ready for JSON: their shapes,
    dtypes and fingerprints, the position in the data, and the fields of `Progress`.
    """
    found = fingerprints(arrays)
    run = {"data": data_state, "progress": progress}
    run["arrays"] = {
        name: [list(a.shape), a.dtype.name, found[name]] for name, a in by_path(arrays).items()
    }
    return run | {"sha256": _sha256(run)}


def read_checkpoint(path, wanted):
    """The arrays that `wanted` describes, and what `beside_arrays` has saved with them.

    Each process reads its own part of the folder `path`. `wanted` is a tree of shapes, dtypes and
    shardings, over any mesh and number of processes. Raises in every process or in none: `Damaged`;
    `UserError` if the checkpoint is of another model; `MachineFault` if it cannot be read.
    """
    damage = None
    with together():
        try:
            read = partial(retry.twice, lambda: _read_alone(path, wanted), Damaged)
            arrays, run = retry.patiently(f"checkpoint {path} cannot be read", read)
        except Damaged as e:
            damage = e
    if not all_agree(damage is None):
        raise damage or Damaged("another process cannot read it")
    found = fingerprints(arrays)
    differing = [name for name, value in found.items() if run["arrays"][name][2] != value]
    # Processes with other copies of an array may have read other values.
    if not all_agree(not differing):
        names = ", ".join(differing[:3]) or "in another process"
        raise Damaged(f"{names}: the values are not those that were saved")
    return arrays, run


def _read_alone(path, wanted):
    # Without this, Orbax would wait for the other processes, which may have failed.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    restore_args = jax.tree.map(
        lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, dtype=a.dtype), wanted
    )
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    try:
        if file := next(_irregular(path), None):  # reading a FIFO would never end
            raise Damaged(f"{file} is a FIFO, a device or a broken link")
        run = json.loads(read_regular(path / "run" / "metadata", _RUN_BYTES))
        if problem := misfit(run, _RUN):
            raise Damaged(problem)
        if run.pop("sha256") != _sha256(run):
            raise Damaged("its position in the data is not what was saved")
        _check_model(path, wanted, run["arrays"])
        for pattern, schema in _OF_ORBAX.items():
            for file in path.glob(pattern):
                if problem := misfit(json.loads(read_regular(file, _RUN_BYTES)), schema):
                    raise Damaged(f"{file.name}: {problem}")
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            arrays = checkpointer.restore(path / "state", args=args)
        if not all(isinstance(a, jax.Array) for a in jax.tree.leaves(arrays)):
            raise Damaged("it has not all of its arrays")
        return arrays, run
    except Failure:
        raise
    except Exception as e:  # Orbax, tensorstore and the file system raise exceptions of their own
        is_of_program = isinstance(e, TypeError | AttributeError | jax.errors.JaxRuntimeError)
        if retry.is_fault(e) or retry.fills_device(e) or is_of_program:
            raise
        raise Damaged(retry.reason(e)) from e


def _irregular(folder):
    """The FIFOs, devices and broken links below a folder on a disk."""
    for entry in [] if is_remote(folder) else os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _irregular(entry.path)
        elif not entry.is_file() and not entry.is_dir():
            yield entry.path


def _check_model(path, wanted, saved):
    for name, a in by_path(wanted).items():
        here, there = [list(a.shape), a.dtype.name], saved.get(name, [])[:2]
        if here != there:
            what = "is not there"
            if there:
                what = f"is {there[1]}{there[0]} there, {here[1]}{here[0]} here"
            raise UserError(
                f"checkpoint {path}: {name} {what}; it is of another model or of another version "
                "of this program"
            )


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""The content of a checkpoint: arrays, by Orbax, and JSON that describes and checks them."""

import contextlib
import hashlib
import json
from functools import cache

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from aoe_jax.distributed import all_agree, together
from aoe_jax.errors import Failure, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, Kind, misfit, or_none, read_regular

_ARRAY = Kind("a shape, a dtype and a checksum", lambda v: isinstance(v, list) and len(v) == 3)
PROGRESS = {
    "loss": or_none(NUMBER),
    "nll": or_none(NUMBER),
    "validation": or_none(Kind("metrics", lambda value: misfit(value, {str: NUMBER}) is None)),
    "validated": Kind("true or false", lambda value: isinstance(value, bool)),
    "skipped_in_row": COUNT,
    "compute_seconds": NUMBER,
    "metrics_bytes": COUNT,
}
_BESIDE = {"data": {}, "progress": PROGRESS, "arrays": {str: _ARRAY}, "sha256": TEXT}
_BESIDE_BYTES = 2**28


class Damaged(Failure):
    """A checkpoint lacks files or differs from what was saved; the message says how."""


def read_checkpoint(path, wanted):
    """`(arrays, JSON of `beside_arrays`)` of the checkpoint in the folder `path`.

    Each process reads its own part. `wanted` is a tree of shapes, dtypes and shardings, over any
    mesh and number of processes. Raises in every process or in none: `Damaged`; `UserError` if the
    checkpoint is of another model; `MachineFault` if it cannot be read.
    """
    damage = None
    with together():
        try:
            arrays, beside = retry.patiently(
                f"checkpoint {path} cannot be read", lambda: _read_alone(path, wanted)
            )
        except Damaged as e:
            damage = e
    if not all_agree(damage is None):
        raise damage or Damaged("another process cannot read it")
    found = checksums(arrays)
    differing = [name for name, value in found.items() if beside["arrays"][name][2] != value]
    # Processes with other copies of an array may have read other values.
    if not all_agree(not differing):
        names = ", ".join(differing[:3]) or "in another process"
        raise Damaged(f"{names}: the values are not those that were saved")
    return arrays, beside


def _read_alone(path, wanted):
    beside = read_beside(path)
    _check_model(path, wanted, beside["arrays"])
    # Without this, Orbax would wait for the other processes, which may have failed.
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted, set_global_shape=False)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with _as_damage(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        arrays = checkpointer.restore(path / "state", args=args)
        if not all(isinstance(a, jax.Array) for a in jax.tree.leaves(arrays)):
            raise Damaged("arrays are missing")
    return arrays, beside


def read_beside(path):
    """The JSON of `beside_arrays` in the checkpoint `path`; raises `Damaged`."""
    with _as_damage():
        beside = json.loads(read_regular(path / "run" / "metadata", _BESIDE_BYTES))
        if problem := misfit(beside, _BESIDE):
            raise Damaged(problem)
        if beside.pop("sha256") != _sha256(beside):
            raise Damaged("run/metadata is not what was saved")
    return beside


@contextlib.contextmanager
def _as_damage():
    """Raises `Damaged` for exceptions that neither a fault nor this program has caused: Orbax and
    tensorstore raise exceptions of many kinds for files that they cannot parse.
    """
    try:
        yield
    except Exception as e:
        of_program = isinstance(e, Failure | jax.errors.JaxRuntimeError)
        if of_program or retry.is_fault(e) or retry.fills_device(e):
            raise
        raise Damaged(retry.reason(e)) from e


def _check_model(path, wanted, saved):
    for name, a in _by_path(wanted).items():
        here, there = [list(a.shape), a.dtype.name], saved.get(name, [])[:2]
        if here != there:
            shown = f"is {there[1]}{there[0]} there, {here[1]}{here[0]} here" if there else ""
            cause = "it is of another model or of another version of this program"
            raise UserError(f"checkpoint {path}: {name} {shown or 'is not there'}; {cause}")


def beside_arrays(arrays, position, progress: dict) -> dict:
    """The JSON of a checkpoint: shapes, dtypes and checksums of its arrays, the position in the
    data, and the fields of `Progress`.
    """
    found = checksums(arrays)
    described = {
        name: [list(a.shape), a.dtype.name, found[name]] for name, a in _by_path(arrays).items()
    }
    beside = {"data": position, "progress": progress, "arrays": described}
    return beside | {"sha256": _sha256(beside)}


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _by_path(tree):
    """The leaves of a tree by their paths in text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def checksums(tree):
    """Checksums of arrays of 8, 16 or 32 bits an element, by their paths in the tree.

    A checksum is the sum, modulo 2^32, of a hash of each element's bits and index. For a given
    index the hash is one to one, so a change of one element always changes the sum. It depends
    neither on the sharding nor on the process. The storage format has no checksum of its own.
    """
    arrays = _by_path(tree)
    leaves = list(arrays.values())
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return dict(zip(arrays, jax.device_get(_sums_on(sharding)(leaves)).tolist(), strict=True))


@cache
def _sums_on(sharding):
    return jax.jit(lambda arrays: jnp.stack([_sum(a) for a in arrays]), out_shardings=sharding)


def _sum(a):
    unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros(a.shape, jnp.uint32), 1
    for axis in reversed(range(a.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= a.shape[axis]
    mixed = bits * (2 * index + 1) + index
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)  # as MurmurHash ends
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

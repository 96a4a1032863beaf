"""Saves and restores the checkpoints of a run with Orbax.

A checkpoint has the arrays of the `TrainState`, and a JSON file with the `Progress` and the shapes,
dtypes and checksums of the arrays.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from aoe_jax.config.training import CheckpointConfig
from aoe_jax.distributed import all_agree, gathered, see_the_same, together
from aoe_jax.errors import Failure, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, Kind, misfit, or_none, read_bytes
from aoe_jax.storage.paths import is_remote, move, unused

log = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"
_ARRAY = Kind("a shape, a dtype and a checksum", lambda v: isinstance(v, list) and len(v) == 3)
_PROGRESS = {
    "loss": or_none(NUMBER),
    "nll": or_none(NUMBER),
    "validation": or_none(Kind("metrics", lambda value: misfit(value, {str: NUMBER}) is None)),
    "validated": Kind("true or false", lambda value: isinstance(value, bool)),
    "skipped_in_row": COUNT,
    "compute_seconds": or_none(NUMBER),
    "metrics_bytes": or_none(COUNT),
}
_BESIDE = {"progress": _PROGRESS, "arrays": {str: _ARRAY}, "sha256": TEXT}
_BESIDE_BYTES = 2**28


@dataclass
class Progress:
    """The progress of a run up to a step. Every checkpoint contains it."""

    loss: float | None = None  # training loss of this step
    nll: float | None = None
    validation: dict[str, float] | None = None  # validation metrics of this step, if it has them
    validated: bool = True  # False if the validation of this step was interrupted
    skipped_in_row: int = 0  # how many updates in a row were skipped, up to this step
    compute_seconds: float = 0.0  # time of computation, summed over all steps so far
    metrics_bytes: int | None = 0  # size of metrics.jsonl; None: saved by an older version


class Damaged(Failure):
    """A checkpoint lacks files, or its content differs from what was saved."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        # JAX's preemption service needs rising step numbers, so only the training loop asks it.
        return False


class Checkpoints:
    """Reads and writes the checkpoints `workdir/checkpoints/STEP`. Call `open` before `save`.

    `saved` is the step of the newest checkpoint that is known to be complete, or 0.
    """

    def __init__(self, workdir: Path):
        """Raises `UserError` if `workdir` is in an object store that Orbax cannot write to."""
        if is_remote(workdir) and not str(workdir).startswith("gs://"):
            wanted = "checkpoints can be on a disk or in gs://BUCKET/..."
            raise UserError(f"--workdir={workdir}: {wanted}; this store can only receive models")
        self.directory = (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"
        self.saved = 0
        self._manager = None  # Orbax's manager; None before `open`, and after a failed save
        self._saving = None  # the step that is being saved in the background, or None
        self._nlls = {}  # step of a checkpoint -> its validation nll

    def steps(self):
        """Sorted steps of complete checkpoints. Raises `UserError` if `directory` is a file."""
        return sorted(retry.patiently(f"{self.directory} cannot be read", self._complete_steps))

    def agreed_steps(self):
        """`steps`, once all processes see the same: a network disk shows moved folders late."""
        with together():
            steps = self.steps()
        see_the_same(str(steps), lambda: str(self.steps()), str(self.directory))
        with together():
            return self.steps()

    def _complete_steps(self):
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; move it away, and bring the folder back")
        # Orbax lists a folder 007 as step 7, so `_path(7)` need not exist.
        found = ocp.utils.checkpoint_steps(self.directory)
        return [step for step in found if step < 2**31 and self._path(step).exists()]

    def _path(self, step):
        return self.directory / str(step)

    def find(self, which):
        """Returns the step of a checkpoint. `which` is "newest", "best" (lowest validation nll) or
        a step as text. Raises `UserError` if there is no such checkpoint.
        """
        steps, workdir = self.steps(), self.directory.parent
        if not steps:
            raise UserError(f"{workdir} has no complete checkpoint; train first")
        if which == "newest":
            return steps[-1]
        if which == "best":
            self._read_nlls(steps)
            if best := self._best_first(steps):
                return best[0]
            there = f"no checkpoint of {workdir} has a validation nll"
            raise UserError(f"--step=best: {there}; train with checkpoint.keep_best")
        if which not in map(str, steps):
            there = f"{workdir} has checkpoints of steps {', '.join(map(str, steps))}"
            raise UserError(f"--step={which}: {there}; or give newest, best")
        return int(which)

    def _read_nlls(self, steps):
        for step in steps:
            with contextlib.suppress(Damaged):
                path = self._path(step)
                beside = retry.patiently(f"{path} cannot be read", partial(read_beside, path))
                self.note(step, beside["progress"]["validation"])

    def note(self, step, validation):
        """Notes the validation of a step, or None, for `keep_best`; `save` does so by itself."""
        if validation and math.isfinite(validation["nll"]):
            self._nlls[step] = validation["nll"]

    def _best_first(self, steps):
        return sorted((step for step in steps if step in self._nlls), key=self._nlls.get)

    def restore(self, step, like):
        """Returns `(state, progress)` of the checkpoint of a step.

        `like` is a `TrainState` of `ShapeDtypeStruct`s with shardings. The saving run may have had
        another mesh or number of processes. Raises the exceptions of `read_checkpoint`.
        """
        arrays, beside = read_checkpoint(self._path(step), vars(like))
        progress = Progress(**{name: beside["progress"].get(name) for name in _PROGRESS})
        progress.compute_seconds = progress.compute_seconds or 0.0  # older versions lack it
        return dataclasses.replace(like, **arrays), progress

    def restore_newest(self, like):
        """Returns `(step, state, progress)` of the newest undamaged checkpoint, and moves
        the damaged newer ones to `damaged_checkpoints`. Raises `UserError` if all checkpoints are
        damaged or one is of another model, and `MachineFault` if they cannot be read.
        """
        while True:
            with together():
                steps = self.steps()
            # All use the list of process 0: on a network disk, others may still see moved folders.
            step, n_steps = gathered(max(steps, default=0))[0], gathered(len(steps))[0]
            try:
                return step, *self.restore(step, like)
            except Damaged as e:
                if n_steps < 2:
                    cure = "and there is no other; --start-over begins anew"
                    raise UserError(f"{self._path(step)} is damaged ({e}), {cure}") from e
                with together():
                    if jax.process_index() == 0:
                        target = unused(self.directory.with_name(DAMAGED) / str(step))
                        move(self._path(step), target)
                        what = f"checkpoint of step {step} is damaged ({e})"
                        log.warning(f"{what} and was moved to {target}")

    def restore_model(self, step, like):
        """Returns `(params, routing_state)` of a step. A damaged checkpoint raises `UserError`."""
        wanted = {name: getattr(like, name) for name in ("params", "routing_state")}
        try:
            model, _ = read_checkpoint(self._path(step), wanted)
        except Damaged as e:
            others = [other for other in self.steps() if other != step]
            hint = f"--step={others[-1]} evaluates another" if others else "there is no other"
            what = f"checkpoint {self._path(step)} is damaged or was just deleted ({e})"
            raise UserError(f"{what}; {hint}") from e
        return model["params"], model["routing_state"]

    def open(self, config: CheckpointConfig):
        """Prepares for saving. All processes call it, after process 0 has acquired the lease."""
        self._config = config
        steps = self.agreed_steps()
        self.saved = max(steps, default=0)
        self._read_nlls(steps if config.keep_best else [])
        self._open()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            save_root_metadata=False,
            preservation_policy=self,
            async_options=ocp.AsyncOptions(
                timeout_secs=int(self._config.timeout),
                # False for one process: after a thread's fault, other threads would wait for 300 s.
                create_directories_asynchronously=jax.process_count() > 1,
            ),
        )
        with together():
            is_first = jax.process_index() == 0 and self.directory.exists()
            # Deletes the folders of unfinished saves, because they would fill the disk.
            for half in ocp.utils.tmp_checkpoints(self.directory) if is_first else ():
                while half.get().exists():
                    # Threads of a failed save may delete files at the same time.
                    with contextlib.suppress(FileNotFoundError):
                        half.get().rmtree()
        self._manager = _Manager(self.directory, options=options)

    def should_preserve(self, checkpoints, *, context):
        """Returns for each checkpoint whether to keep it. Orbax calls this after every save."""
        config, steps = self._config, [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-config.keep :], *self._best_first(steps)[: config.keep_best]}
        if config.keep_every:
            kept.update(step for step in steps if step % config.keep_every == 0)
        return [step in kept for step in steps]

    def save(self, step, state, progress: Progress, wait=False):
        """Starts to save, in the background, the state after `step` updates. After the call the
        caller may donate the state. With `wait`, or if the previous save failed, the call returns
        only when the save has succeeded. A single process repeats a failed save for
        `retry_seconds`, then raises `MachineFault`. With several processes, a failed save ends all.
        """
        wait = self._finish() is not None or wait
        if step == self.saved:
            return
        self.note(step, progress.validation)
        arrays = vars(state)
        beside = beside_arrays(arrays, dataclasses.asdict(progress))
        parts = {"state": ocp.args.StandardSave(arrays), "run": ocp.args.JsonSave(beside)}

        def attempt():
            if self._manager is None:
                self._open()
            self._saving = step
            try:
                self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
            except Exception as e:
                self._give_up()
                # A thread of the save that failed before may still make and delete files.
                if isinstance(e, FileExistsError | FileNotFoundError):
                    raise OSError(errno.EBUSY, str(e)) from e
                raise
            if wait and (problem := self._finish()):
                raise problem

        if jax.process_count() > 1:
            attempt()
        else:
            retry.patiently(f"checkpoint {self._path(step)} cannot be saved", attempt)

    def _finish(self):
        """Waits for the save in the background; returns the fault that prevented it, or None."""
        if self._saving is None:
            return None
        step = self._saving
        try:
            self._manager.wait_until_finished()
            if step not in self._complete_steps():
                raise OSError(f"checkpoint {step} is not there after its save")
        except Exception as e:  # Orbax and tensorstore raise exceptions of many kinds
            if jax.process_count() > 1 or not (retry.is_fault(e) or isinstance(e, OSError)):
                raise
            self._give_up()
            log.warning(f"checkpoint {self._path(step)} cannot be saved: {retry.reason(e)}")
            return e
        self._saving, self.saved = None, step
        return None

    def _give_up(self):
        """Closes Orbax's manager after a fault. The next save opens a new one."""
        self._saving, manager, self._manager = None, self._manager, None
        with contextlib.suppress(Exception):  # `close` raises the exceptions of Orbax's threads
            manager.close()

    def has_failed(self):
        """Whether the save in the background has failed; always False with several processes."""
        ended = self._saving is not None and not self._manager.is_saving_in_progress()
        return jax.process_count() == 1 and ended and self._finish() is not None

    def close(self):
        """Waits for the save in the background; raises its exception if it failed."""
        if problem := self._finish():
            raise problem
        if self._manager:
            self._manager.close()


def read_checkpoint(path, wanted):
    """Returns `(arrays, saved result of `beside_arrays`)` from the checkpoint in the folder `path`.

    `wanted` is a tree of `ShapeDtypeStruct`s with shardings. Each process reads the shards of its
    own devices. Raises `Damaged`, `UserError` if the checkpoint is of another model, or
    `MachineFault` if it cannot be read. If one process fails, all processes raise.
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
    for rounds in (2, 1):  # versions of 30 November 2026 used one round
        found = checksums(arrays, rounds)
        differing = [name for name, value in found.items() if beside["arrays"][name][2] != value]
        # Processes read their own copies of replicated arrays, so perhaps only one finds damage.
        if all_agree(not differing):
            return arrays, beside
    names = ", ".join(differing[:3]) or "in another process"
    raise Damaged(f"{names}: the values are not those that were saved")


def _read_alone(path, wanted):
    beside = read_beside(path)
    _check_model(path, wanted, beside["arrays"])
    # With its defaults, Orbax would wait for the other processes, which may have failed.
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
    """Reads the JSON of `beside_arrays` from the checkpoint `path`. Raises `Damaged`."""
    with _as_damage():
        beside = json.loads(read_bytes(path / "run" / "metadata", _BESIDE_BYTES))
        if problem := misfit(beside, _BESIDE):
            raise Damaged(problem)
        if beside.pop("sha256") != _sha256(beside):
            raise Damaged("run/metadata is not what was saved")
    return beside


@contextlib.contextmanager
def _as_damage():
    """Turns exceptions, except machine faults and errors of JAX or this program, into `Damaged`.
    Orbax and tensorstore raise exceptions of many types for files that they cannot parse.
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


def beside_arrays(arrays, progress: dict) -> dict:
    """The JSON of a checkpoint: its arrays' shapes, dtypes and checksums, and progress."""
    found = checksums(arrays)
    described = {
        name: [list(a.shape), a.dtype.name, found[name]] for name, a in _by_path(arrays).items()
    }
    beside = {"progress": progress, "arrays": described}
    return beside | {"sha256": _sha256(beside)}


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _by_path(tree):
    """Returns `{path in the tree as text: leaf}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def checksums(tree, rounds=2):
    """Returns `{path in the tree: checksum}` of arrays with 8, 16 or 32 bits per element.

    A checksum is the sum, modulo 2^32, of a hash of each element's bits and index. For a given
    index, different bits have different hashes, so a change of one element always changes the sum.
    The sum does not depend on the sharding. Orbax's storage format has no checksums of values.
    """
    arrays = _by_path(tree)
    leaves = list(arrays.values())
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return dict(
        zip(arrays, jax.device_get(_sums_on(sharding, rounds)(leaves)).tolist(), strict=True)
    )


@cache
def _sums_on(sharding, rounds):
    sums = lambda arrays: jnp.stack([_sum(a, rounds) for a in arrays])  # noqa: E731
    return jax.jit(sums, out_shardings=sharding)


def _sum(a, rounds):
    unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros(a.shape, jnp.uint32), 1
    for axis in reversed(range(a.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= a.shape[axis]
    mixed = bits * (2 * index + 1) + index
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35))[:rounds]:  # of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> (13, 16)[rounds - 1]), dtype=jnp.uint32)

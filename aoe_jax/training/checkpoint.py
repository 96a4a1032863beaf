"""Orbax checkpoints of model state and data position together."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from aoe_jax.config.training import CheckpointConfig
from aoe_jax.distributed import all_agree
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.training.fingerprint import fingerprints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Figures of a run that its checkpoint keeps, beside the state and the position in the data."""

    loss: float  # of the newest training step
    nll: float
    validated: bool  # False: the run was stopped before the validation that is due after this step
    skipped_in_row: int = 0  # number of updates skipped directly before


class Damaged(Exception):
    """A checkpoint can't be read, or differs from what was saved; the message says why."""


class _Unreadable(Exception):
    """A checkpoint can't be read at present because this machine is at fault."""


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's preemption service to the training loop.

    The service expects rising numbers, and Orbax asks in the background with numbers of its own: a
    request to stop could come at a number that the loop has passed.
    """

    def reached_preemption(self, step):
        """Asks nothing."""
        return False


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP`."""

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None):
        """Opens `workdir/checkpoints`; for reading only, which makes no folder, if `config` is
        None.
        """
        self.directory = workdir.absolute() / "checkpoints"
        self._config = config
        self._manager = None
        self._saving = None  # the step that is being saved in the background
        self._nlls = _validation_nlls(workdir / "metrics.jsonl")
        if config is None and not self.directory.is_dir():
            return
        options = ocp.CheckpointManagerOptions(read_only=True)
        if config is not None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(config, self._nlls),
                cleanup_tmp_directories=True,  # half saves of a killed run would fill the disk
                enable_async_checkpointing=True,
            )
        state, run = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
        self._manager = _Manager(
            self.directory,
            options=options,
            item_names=("state", "run"),
            item_handlers={"state": state, "run": run},
        )

    def steps(self):
        """The steps of all complete checkpoints, the oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def latest_step(self):
        """The step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def find(self, which):
        """The step of a checkpoint that a user names "newest", "best" (lowest validation nll) or by
        its number.

        Raises:
          UserError: it doesn't exist.
        """
        steps, workdir = self.steps(), self.directory.parent
        if not steps:
            raise UserError(f"{workdir} has no complete checkpoint; train first")
        if which == "newest":
            return steps[-1]
        if which == "best":
            best = _best(steps, self._nlls, 1)
            if not best:
                raise UserError(
                    f"--step=best: no checkpoint of {workdir} has a validation nll; train with "
                    "checkpoint.keep_best"
                )
            return best[0]
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(
                f"--step={which}: {workdir} has checkpoints of steps "
                f"{', '.join(map(str, steps))}; or give newest, best"
            )
        return int(which)

    def due(self, step):
        """Whether `checkpoint.every` asks for a checkpoint of `step`."""
        return step % self._config.every == 0

    def validated(self, step, nll):
        """Notes the validation nll of a step, by which `checkpoint.keep_best` chooses."""
        self._nlls[step] = nll

    def save(self, step, state, data_state, progress: Progress):
        """Saves in the background; returns as soon as `state` may be donated.

        Args:
          step: number of updates.
          state: the `TrainState`.
          data_state: the JSON-ready position in the data, the same in every process.
          progress: see `Progress`.

        Raises:
          UserError: this checkpoint or the one before can't be written.
        """
        if self._saving is not None:
            self._wait()
        state = _as_dict(state)
        run = {"data": data_state, "progress": dataclasses.asdict(progress)}
        run["arrays"] = _described(state)
        run["sha256"] = _sha256(run)
        self._saving = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        with self._errors_named():
            self._manager.save(step, args=args, force=True)  # `due` decides

    def check(self):
        """Raises `UserError` if the save in the background has failed; doesn't wait for it."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def close(self):
        """Waits for the save in the background; raises `UserError` if it fails."""
        if self._manager:
            self._wait()
            self._manager.close()

    def _wait(self):
        with self._errors_named():
            self._manager.wait_until_finished()
        self._saving = None

    @contextlib.contextmanager
    def _errors_named(self):
        try:
            yield
        except (OSError, ValueError) as e:  # tensorstore raises ValueError for errors of the system
            failed, self._saving = self._saving, None
            steps = [step for step in ocp.utils.checkpoint_steps(self.directory) if step != failed]
            then = "none is complete yet"
            if steps:
                then = f"the same command goes on from step {max(steps)}"
            raise UserError(
                f"checkpoint {self.directory / str(failed)} can't be saved: {_reason(e)}\n"
                f"Free or mend the disk; then {then}"
            ) from e

    def restore_newest(self, abstract_state, data_iterator):
        """Restores the newest checkpoint that can be read.

        Damaged ones are moved to `damaged_checkpoints`, with a warning. Each process reads its own
        part; a checkpoint that one of them can't read counts as damaged for all.

        Args:
          abstract_state: shapes, dtypes and shardings, over any mesh and number of processes.
          data_iterator: is moved to its position.

        Returns:
          `(step, state, progress)`.

        Raises:
          UserError: no checkpoint can be read, the newest holds another model, or this machine is
            at fault.
        """
        while True:
            *older, step = self.steps()
            try:
                state, progress, position = self.restore(step, abstract_state)
            except Damaged as e:
                if not older:
                    raise UserError(
                        f"checkpoint {self.directory / str(step)} can't be read ({e}), and there "
                        "is no other. To start anew, use another --workdir"
                    ) from e
                self._set_aside(step, e)
                continue
            data_iterator.set_state(position)
            data_iterator.start_prefetch()
            return step, state, progress

    def restore(self, step, abstract_state):
        """`(state, progress, position in the data)` of a step.

        Raises:
          Damaged: the checkpoint can't be read, or differs from what was saved.
          UserError: it holds another model, or this machine is at fault.
        """
        state, run = self._read(step, _as_dict(abstract_state))
        state = dataclasses.replace(abstract_state, **state)
        return state, Progress(**run["progress"]), run["data"]

    def restore_model(self, step, abstract_state):
        """`(params, routing_state)` of a step, the parts of a state that evaluation needs.

        Raises:
          UserError: the checkpoint can't be read, or holds another model.
        """
        wanted = {"params": abstract_state.params}
        if abstract_state.routing_state:
            wanted["routing_state"] = abstract_state.routing_state
        try:
            model, _ = self._read(step, wanted)
        except Damaged as e:
            others = [other for other in self.steps() if other != step]
            hint = f"--step={others[-1]} evaluates another" if others else "there is no other"
            raise UserError(
                f"checkpoint {self.directory / str(step)} can't be read ({e}); {hint}"
            ) from e
        return model["params"], model.get("routing_state", {})

    def _set_aside(self, step, problem):
        if jax.process_index() == 0:
            aside = self.directory.with_name("damaged_checkpoints")
            aside.mkdir(exist_ok=True)
            target, n = aside / str(step), 1
            while target.exists():
                target, n = aside / f"{step}-{n}", n + 1
            os.replace(self.directory / str(step), target)
            log.warning(f"checkpoint of step {step} is damaged ({problem}): set aside as {target}")
        multihost_utils.sync_global_devices("the damaged checkpoint is set aside")
        self._manager.reload()

    def _read(self, step, wanted):
        """The arrays that `wanted` describes, and what was saved beside them.

        Raises `Damaged` or `UserError`, in every process or in none; see `restore`.
        """
        path = self.directory / str(step)
        problem = arrays = run = None
        try:
            arrays, run = self._read_alone(path, wanted)
        except (Damaged, _Unreadable) as e:
            problem = e
        if not all_agree(not isinstance(problem, _Unreadable)):
            reason = problem or "by another process"
            raise UserError(
                f"checkpoint {path} can't be read at present ({reason}); mend that: the same "
                "command then goes on"
            )
        if not all_agree(problem is None):
            raise problem or Damaged("another process can't read it")
        found = fingerprints(arrays)
        differing = [name for name, value in found.items() if run["arrays"][name][2] != value]
        if differing:
            raise Damaged(f"what was read of {', '.join(differing[:3])} isn't what was saved")
        return arrays, run

    def _read_alone(self, path, wanted):
        run = _read_item(path / "run", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
        if run.pop("sha256", None) != _sha256(run):
            raise Damaged("what was read of its position isn't what was saved")
        _check_model(path, wanted, run["arrays"])
        restore_args = jax.tree.map(
            lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, dtype=a.dtype), wanted
        )
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return _read_item(path / "state", ocp.PyTreeCheckpointHandler, args), run


def _read_item(path, handler, args):
    # By itself, Orbax would wait for the other processes, which may have failed.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = handler(multiprocessing_options=alone)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            return checkpointer.restore(path, args=args)
    except Exception as e:  # Orbax, tensorstore and the file system each have their own
        if any(words in _chain(e) for words in _FAULTS_OF_THE_MACHINE):
            raise _Unreadable(_reason(e)) from e
        raise Damaged(_reason(e)) from e


# Words of JAX, tensorstore and Linux in errors of memory, disks and the system.
_FAULTS_OF_THE_MACHINE = (
    "MemoryError",
    "RESOURCE_EXHAUSTED",
    "Out of memory",
    "Cannot allocate memory",
    "Too many open files",
    "Input/output error",
    "Stale file handle",
    "PERMISSION_DENIED",
    "Permission denied",
)


def _check_model(path, wanted, saved):
    for key_path, a in jax.tree_util.tree_leaves_with_path(wanted):
        name = jax.tree_util.keystr(key_path)
        here, there = [list(a.shape), a.dtype.name], saved.get(name, [])[:2]
        if here != there:
            what = "isn't there"
            if there:
                what = f"is {there[1]}{there[0]} there, {here[1]}{here[0]} here"
            raise UserError(
                f"checkpoint {path}: {name} {what}; it is of another model or of another version "
                "of this program"
            )


def _validation_nlls(metrics_file: Path):
    """The finite validation nll of each step in `metrics.jsonl`."""
    nlls = {}
    for line in metrics_file.read_text().splitlines() if metrics_file.exists() else []:
        # Lines of training and null raise errors, and so does the half line of a killed run.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(line)
            nlls[line["step"]] = float(line["validation_nll"])
    return nlls


def _best(steps, nlls, n):
    """The `n` steps of lowest finite nll, the best first."""
    scored = [step for step in steps if math.isfinite(nlls.get(step, math.nan))]
    return sorted(scored, key=nlls.get)[:n]


@dataclass(frozen=True)
class _BestN:
    """An Orbax preservation policy: keeps the checkpoints of lowest validation nll."""

    n: int
    nlls: dict

    def should_preserve(self, checkpoints, *, context):
        best = _best([checkpoint.step for checkpoint in checkpoints], self.nlls, self.n)
        return [checkpoint.step in best for checkpoint in checkpoints]


def _preservation(config, nlls):
    policies = [checkpoint_managers.LatestN(config.keep)]
    if config.keep_every:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
    if config.keep_best:
        policies.append(_BestN(config.keep_best, nlls))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _as_dict(state):
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(tree):
    """The JSON-ready shape, dtype and fingerprint of every array by its path."""
    prints = fingerprints(tree)
    described = {}
    for key_path, a in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(key_path)
        described[name] = [list(a.shape), a.dtype.name, prints[name]]
    return described


def _chain(error):
    """The text of an exception and of all its causes."""
    return f"{type(error).__name__}: {error} {_chain(error.__cause__)}" if error else ""


def _reason(error):
    """The first line of the first cause of an exception."""
    while error.__cause__:
        error = error.__cause__
    if is_disk_full(error):
        return "no space left on the disk"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

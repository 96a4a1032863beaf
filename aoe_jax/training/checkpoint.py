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
from orbax.checkpoint import checkpoint_managers

from aoe_jax.config import CheckpointConfig
from aoe_jax.distributed import all_agree, barrier
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.training.fingerprint import fingerprints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says of its run beside the state and the position in the data."""

    loss: float  # of the training step that it follows
    nll: float
    validated: bool  # False: the run was stopped before the validation that is due after this step
    skipped_in_row: int = 0  # updates skipped up to this step


class Damaged(Exception):
    """A checkpoint can't be read, or isn't what was saved; the message says why."""


class _Unreadable(Exception):
    """A checkpoint can't be read here and now, which says nothing of the checkpoint."""


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's preemption service to the training loop.

    The service goes by the number of the last question, and Orbax asks with numbers of its own,
      also in the background: a
    request to stop could then come at a number that the loop has passed.
    """

    def reached_preemption(self, step):
        """Asks nothing."""
        return False


class Checkpoints:
    """The checkpoints of one workdir, `workdir/checkpoints/STEP`."""

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None):
        """Opens `workdir/checkpoints`; without a configuration, for reading only: then nothing is
        made there.
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
                cleanup_tmp_directories=True,  # of saves that were cut off; they may fill the disk
                enable_async_checkpointing=True,
            )
        self._manager = _Manager(
            self.directory,
            options=options,
            item_names=("state", "run"),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self):
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step() if self._manager else None

    def find(self, which):
        """The step of a checkpoint by the word of a user: "newest", "best" (lowest validation nll)
        or a number.

        Raises:
          UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory.parent} has no complete checkpoint; train first")
        if which == "newest":
            return steps[-1]
        if which == "best":
            best = _best(steps, self._nlls, 1)
            if not best:
                raise UserError(
                    f"--step=best: no checkpoint of {self.directory.parent} has a validation nll; train with "
                    "checkpoint.keep_best"
                )
            return best.pop()
        if not which.isdecimal() or int(which) not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(
                f"--step={which}: {self.directory.parent} has checkpoints of steps {there}; or give newest, best"
            )
        return int(which)

    def steps(self):
        """The steps of all complete checkpoints, the oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def due(self, step):
        """Whether `checkpoint.every` asks for a checkpoint of `step`."""
        return step % self._config.every == 0

    def validated(self, step, nll):
        """Takes note of the validation nll of the model of `step`; `checkpoint.keep_best` goes by
        it.
        """
        self._nlls[step] = nll

    def save(self, step, state, data_state, progress: Progress):
        """Saves in the background; returns as soon as `state` may be donated.

        Args:
          step: number of updates.
          state: the `TrainState`.
          data_state: the position in the data, JSON-ready: a number of batches and what they held
            of each source, the same in every process.
          progress: see `Progress`.

        Raises:
          UserError: the disk can't take this checkpoint, or couldn't take the one before.
        """
        if self._saving is not None:
            self._wait()
        state = {name: value for name, value in _as_dict(state).items() if value is not None}
        run = {
            "data": data_state,
            "progress": dataclasses.asdict(progress),
            "arrays": _described(state),
        }
        self._saving = step
        with self._errors_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    run=ocp.args.JsonSave({**run, "sha256": _sha256(run)}),
                ),
                force=True,  # `due` decides
            )

    def check(self):
        """Looks at the save in the background, without waiting for it.

        Raises:
          UserError: it has failed.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def _wait(self):
        with self._errors_named():
            self._manager.wait_until_finished()
        self._saving = None

    @contextlib.contextmanager
    def _errors_named(self):
        try:
            yield
        except (OSError, ValueError) as e:  # tensorstore turns what the system says into ValueError
            failed, self._saving = self._saving, None
            complete = [
                step for step in ocp.utils.checkpoint_steps(self.directory) if step != failed
            ]
            then = (
                f"the same command goes on from step {max(complete)}"
                if complete
                else "none is complete yet"
            )
            raise UserError(
                f"checkpoint {self.directory / str(failed)} can't be saved: {_reason(e)}\n"
                f"Free or mend the disk; then {then}"
            ) from e

    def restore_newest(self, abstract_state, data_iterator):
        """Restores the newest checkpoint that can be read; newer ones are set aside, with a
        warning.

        Every process reads its part by itself; what one of them can't read counts as damaged for
        all.

        Args:
          abstract_state: shapes, dtypes and shardings; over any mesh and any number of processes.
          data_iterator: is moved to its position.

        Returns:
          `(step, state, progress)`.

        Raises:
          UserError: no checkpoint can be read, the newest holds another model, or the fault is with
            this machine.
        """
        while True:
            *older, step = self.steps()
            try:
                state, progress, position = self.restore(step, abstract_state)
            except Damaged as e:
                if not older:
                    raise UserError(
                        f"checkpoint {self.directory / str(step)} can't be read ({e}), and there is no other. To start "
                        "anew, use another --workdir"
                    ) from e
                self._set_aside(step, e)
                continue
            data_iterator.set_state(position)
            data_iterator.start_prefetch()
            return step, state, progress

    def restore(self, step, abstract_state):
        """`(state, progress, position in the data)` of a step.

        Raises:
          Damaged: it can't be read, or isn't what was saved.
          UserError: it holds another model.
        """
        wanted = {name: a for name, a in _as_dict(abstract_state).items() if a is not None}
        state, run = self._read(step, wanted)
        return (
            dataclasses.replace(abstract_state, **state),
            Progress(**run["progress"]),
            run["data"],
        )

    def _set_aside(self, step, problem):
        if jax.process_index() == 0:
            aside = self.directory.with_name("damaged_checkpoints")
            aside.mkdir(exist_ok=True)
            target, n = aside / str(step), 1
            while target.exists():
                target, n = aside / f"{step}-{n}", n + 1
            os.replace(self.directory / str(step), target)
            log.warning(
                "checkpoint of step %d is damaged (%s): set aside as %s", step, problem, target
            )
        barrier("the damaged checkpoint is set aside")
        self._manager.reload()

    def restore_model(self, step, abstract_state):
        """What evaluation needs of a state: `(params, routing_state)`.

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

    def _read(self, step, wanted):
        """The arrays that `wanted` describes and what was saved with them.

        Raises, in every process or in none:
          Damaged: as in `restore`.
          UserError: it can't be read here and now.
        """
        path = self.directory / str(step)
        problem = unreadable = None
        try:
            run = self._read_item(path / "run", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
            if run.pop("sha256", None) != _sha256(run):
                raise Damaged("what was read of its position isn't what was saved")
            self._check_model(path, wanted, run["arrays"])
            restore_args = jax.tree.map(
                lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, dtype=a.dtype), wanted
            )
            args = ocp.args.PyTreeRestore(
                item=wanted, restore_args=restore_args, partial_restore=True
            )
            arrays = self._read_item(path / "state", ocp.PyTreeCheckpointHandler, args)
        except Damaged as e:
            problem = str(e)
        except _Unreadable as e:
            unreadable = str(e)
        if not all_agree(unreadable is None):
            raise UserError(
                f"checkpoint {path} can't be read at present ({unreadable or 'by another process'}); mend that: the same "
                "command then goes on"
            )
        if not all_agree(problem is None):
            raise Damaged(problem or "another process can't read it")
        differing = [
            name for name, value in fingerprints(arrays).items() if run["arrays"][name][2] != value
        ]
        if differing:
            raise Damaged(f"what was read of {', '.join(differing[:3])} isn't what was saved")
        return arrays, run

    def _check_model(self, path, wanted, saved):
        for key_path, a in jax.tree_util.tree_leaves_with_path(wanted):
            name = jax.tree_util.keystr(key_path)
            here, there = [list(a.shape), a.dtype.name], saved.get(name, [])[:2]
            if here != there:
                what = (
                    f"is {there[1]}{there[0]} there, {here[1]}{here[0]} here"
                    if there
                    else "isn't there"
                )
                raise UserError(f"checkpoint {path}: {name} {what}; {_OTHER_MODEL}")

    def _read_item(self, path, handler, args):
        # As if this process were alone: Orbax would else wait for the others, who may have failed.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process_{jax.process_index()}",
        )
        try:
            with ocp.Checkpointer(
                handler(multiprocessing_options=alone), multiprocessing_options=alone
            ) as checkpointer:
                return checkpointer.restore(path, args=args)
        except (
            Exception
        ) as e:  # Orbax, tensorstore and the file system each raise kinds of their own
            here = any(words in _all_of(e) for words in _FAULTS_OF_THE_MACHINE)
            raise (_Unreadable if here else Damaged)(_reason(e)) from e

    def close(self):
        """Waits for what is being saved.

        Raises:
          UserError: it couldn't be saved.
        """
        if self._manager:
            self._wait()
            self._manager.close()


_OTHER_MODEL = "it is of another model or of another version of this program"


# What memory, disks and the system say when they are at fault, in the words of JAX, tensorstore and
# Linux.
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


def _validation_nlls(metrics_file: Path):
    """Of each step that was validated, the finite nll, as `metrics.jsonl` has it."""
    nlls = {}
    for line in metrics_file.read_text().splitlines() if metrics_file.exists() else []:
        try:
            line = json.loads(line)
            nlls[line["step"]] = float(line["validation_nll"])
        except (
            ValueError,
            KeyError,
            TypeError,
        ):  # of training, not finite, or the half line of a killed run
            continue
    return nlls


def _best(steps, nlls, n):
    """The `n` steps of lowest finite nll."""
    return set(
        sorted((step for step in steps if math.isfinite(nlls.get(step, math.nan))), key=nlls.get)[
            :n
        ]
    )


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
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(tree):
    """Shape, dtype and fingerprint of every array by its path, JSON-ready."""
    found = fingerprints(tree)
    arrays = {
        jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {path: [list(a.shape), a.dtype.name, found[path]] for path, a in arrays.items()}


def _all_of(error):
    """An exception and all that caused it, in words."""
    return f"{type(error).__name__}: {error} {_all_of(error.__cause__)}" if error else ""


def _reason(error):
    """The first line of what is at the root of an exception."""
    while error.__cause__:
        error = error.__cause__
    if is_disk_full(error):
        return "no space left on the disk"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

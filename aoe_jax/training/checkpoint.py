"""Orbax checkpoints of model state and data position together."""

import contextlib
import dataclasses
import errno
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from aoe_jax.config.training import CheckpointConfig
from aoe_jax.distributed import all_agree, gathered, together
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import read_metrics
from aoe_jax.storage.paths import is_remote, move, unused
from aoe_jax.training.checkpoint_content import PROGRESS, Damaged, beside_arrays, read_checkpoint
from aoe_jax.training.save_barrier import SaveBarrier

log = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"


@dataclass
class Progress:
    """Figures of a run that its checkpoint keeps, beside the state and the position in the data."""

    loss: float | None = None  # of the newest training step
    nll: float | None = None
    validated: bool = True  # False: the validation that is due after this step is not done
    skipped_in_row: int = 0  # number of updates skipped directly before


class _Manager(ocp.CheckpointManager):
    """Leaves JAX's preemption service to the training loop.

    The service expects rising step numbers. Orbax would ask it in the background with other
    numbers, so that a request to stop could come at a number that the loop has passed.
    """

    def reached_preemption(self, step):
        """Returns False without asking the service."""
        return False


def check_store(workdir: Path):
    """Raises `UserError` if `workdir` is in a store to which Orbax does not write."""
    if is_remote(workdir) and not str(workdir).startswith("gs://"):
        wanted = "checkpoints can be on a disk or in gs://BUCKET/..."
        raise UserError(f"--workdir={workdir}: {wanted}; a store of this kind can hold models")


class Checkpoints:
    """The checkpoints `workdir/checkpoints/STEP`; without a `config` they are only read."""

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None):
        """Reads the validation nlls in `metrics.jsonl`. Raises `UserError` like `check_store`."""
        check_store(workdir)
        self.directory = (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"
        self._manager = None  # None until it is opened, and after a fault until the next save
        self._saving = None  # the step that is being saved in the background
        self._problem = None  # the fault of the newest save in this process, if there was one
        self._failed = False  # whether the newest save left no complete checkpoint
        self._looked_at = None  # the step whose save `has_failed` has found ended
        metrics = workdir / "metrics.jsonl"
        retry.patiently(f"{metrics} cannot be read", lambda: self._read_figures(metrics))
        if config is not None:
            self.open(config, max(self.steps(), default=0))

    def _read_figures(self, metrics):
        self.has_figures, self._nlls = False, {}  # finite validation nlls by step
        for line in read_metrics(metrics):
            self.has_figures = True
            if line.get("validation_nll") is not None:
                self.validated(line["step"], line["validation_nll"])

    def open(self, config: CheckpointConfig, saved: int, is_in_place=lambda: True):
        """Begins to save in a run that goes on from the checkpoint of step `saved`, 0 for none; all
        processes call it together. Validation nlls of later steps are forgotten. `is_in_place` says
        in process 0 whether the workdir is still that of the run: where a disk was mounted, a save
        would make the same folders in its mount point.
        """
        self._config, self._is_in_place = config, is_in_place
        self.saved = saved  # the step of the newest checkpoint that is known to be complete
        self._nlls = {step: nll for step, nll in self._nlls.items() if step <= saved}
        self._open()

    def _open(self):
        with together():
            if jax.process_index() == 0:
                retry.patiently(f"{self.directory} cannot be made", self._make_folder)
                problem = f"an unfinished save in {self.directory} cannot be deleted"
                retry.patiently(problem, self._delete_half_saves)
        alone = jax.process_count() == 1
        saving = ocp.AsyncOptions(
            timeout_secs=int(self._config.timeout),
            barrier_sync_fn=None if alone else SaveBarrier(),
            # If a folder cannot be made in the background, other threads wait 300 s for it.
            create_directories_asynchronously=not alone,
        )
        options = ocp.CheckpointManagerOptions(
            create=False, save_root_metadata=False, preservation_policy=self, async_options=saving
        )
        with together():
            manager = retry.patiently(
                f"{self.directory} cannot be opened",
                lambda: _Manager(self.directory, options=options),
            )
        self._manager = manager

    def _make_folder(self):
        if not self._is_in_place():
            problem = "the workdir is gone or was taken over; is its disk mounted?"
            raise OSError(errno.ESTALE, problem)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _delete_half_saves(self):
        """Deletes the unfinished saves of killed runs and of failed saves, which fill the disk."""
        for half in ocp.utils.tmp_checkpoints(self.directory):
            while half.get().exists():
                # Threads of the failed save may be deleting files of theirs at the same time.
                with contextlib.suppress(FileNotFoundError):
                    half.get().rmtree()

    def validated(self, step, nll):
        """Notes the validation nll of a step, by which `checkpoint.keep_best` chooses."""
        if math.isfinite(nll):
            self._nlls[step] = nll

    def _best_first(self, steps):
        return sorted((step for step in steps if step in self._nlls), key=self._nlls.get)

    def should_preserve(self, checkpoints, *, context):
        """Whether to keep each checkpoint, as a preservation policy of Orbax."""
        config, steps = self._config, [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-config.keep :], *self._best_first(steps)[: config.keep_best]}
        if config.keep_every:
            kept.update(step for step in steps if step % config.keep_every == 0)
        return [step in kept for step in steps]

    def steps(self):
        """Sorted steps of complete checkpoints; raises `UserError` if their folder is a file."""
        return sorted(retry.patiently(f"{self.directory} cannot be read", self._complete_steps))

    def _complete_steps(self):
        if not self.directory.exists():
            if not is_remote(self.directory) and self.directory.is_symlink():
                raise OSError(errno.ESTALE, "it is a link to nothing; is its disk mounted?")
            return []
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; move it away, and bring the folder back")
        # Orbax reads other names as numbers, too, such as 007.
        return [
            step
            for step in ocp.utils.checkpoint_steps(self.directory)
            if step < 2**31 and self._path(step).exists()
        ]

    def _path(self, step):
        return self.directory / str(step)

    def find(self, which):
        """The step of the checkpoint "newest", "best" (lowest validation nll) or of that number.
        Raises `UserError` if it does not exist.
        """
        steps, workdir = self.steps(), self.directory.parent
        if not steps:
            raise UserError(f"{workdir} has no complete checkpoint; train first")
        if which == "newest":
            return steps[-1]
        if which == "best":
            if best := self._best_first(steps):
                return best[0]
            raise UserError(
                f"--step=best: no checkpoint of {workdir} has a validation nll; train with "
                "checkpoint.keep_best"
            )
        if which not in map(str, steps):
            raise UserError(
                f"--step={which}: {workdir} has checkpoints of steps "
                f"{', '.join(map(str, steps))}; or give newest, best"
            )
        return int(which)

    def save(self, step, state, data_state, progress: Progress, wait=False):
        """Saves the state after `step` updates in the background; returns once it may be donated.

        `data_state` is the JSON-ready position in the data, the same in every process. With `wait`,
        or if the save before this one failed, it returns when this one has succeeded. Raises
        `MachineFault` if nothing could be saved for `retry.retry_seconds`.
        """
        wait = not self.finish() or wait
        state = vars(state)
        run = beside_arrays(state, data_state, dataclasses.asdict(progress))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        for pause in retry.pauses():
            if self._manager is None:
                self._open()
                if self._is_complete(step):
                    self._failed, self.saved = False, step
                    return
            self._saving, self._problem = None, None
            if not self._can_make_folders():
                self._failed = True
                log.warning(f"checkpoint {self._path(step)} cannot be saved: {self._why()}")
            else:
                self._saving = step
                # Processes wait for each other in there, so a fault of one must end the run.
                alone = jax.process_count() == 1
                with self._problem_kept() if alone else contextlib.nullcontext():
                    self._manager.save(step, args=args, force=True)  # at any step
            if not wait or self.finish():
                return
            # The clocks of processes differ, and all must go on or end.
            if not all_agree(pause is not None):
                raise MachineFault(
                    f"checkpoint {self._path(step)} cannot be saved ({self._why()}); it was tried "
                    f"for {retry.retry_seconds:g} s"
                )
            time.sleep(pause)

    def _can_make_folders(self):
        """Whether process 0 can make the folder of a checkpoint; if that failed in the background,
        the other processes would wait 300 s.
        """
        if jax.process_count() == 1 or is_remote(self.directory):
            return True
        if jax.process_index() == 0:
            folder = self.directory / f"probe{ocp.utils.TMP_DIR_SUFFIX}"  # see _delete_half_saves
            with self._problem_kept():
                folder.mkdir(exist_ok=True)
                folder.rmdir()
        return all_agree(self._problem is None)

    def finish(self):
        """Waits for the save in the background; returns whether it succeeded in all processes."""
        if self._saving is None:
            return not self._failed
        with self._problem_kept():
            self._manager.wait_until_finished()
        step, self._saving = self._saving, None
        has_problem = not all_agree(self._problem is None)
        if has_problem:
            self._close()
        self._failed = not self._is_complete(step)
        if self._failed:
            self._close()
        else:
            self.saved = step
        if has_problem or self._failed:
            result = "cannot be saved" if self._failed else "is complete, but other work failed"
            log.warning(f"checkpoint {self._path(step)} {result}: {self._why()}")
        return not self._failed

    def _close(self):
        """Closes the manager after a fault, when Orbax's threads for the save have ended. Writes
        that other threads have begun may still go on.
        """
        while self._manager:
            try:
                self._manager.close()
                self._manager = None
            except Exception as e:  # Orbax raises one error at a time
                if not isinstance(e, OSError) and not retry.is_fault(e):
                    raise
                log.warning("in the save that failed: %s", retry.reason(e))

    def _is_complete(self, step):
        is_there, what = False, f"{self._path(step)} cannot be read"
        with together(), contextlib.suppress(OSError):
            if jax.process_index() == 0:  # which gives a complete checkpoint its name
                is_there = retry.patiently(what, lambda: self._is_there(step))
        return bool(gathered(is_there)[0])

    def _is_there(self, step):
        is_there = self._is_in_place() and step in self._complete_steps()
        return is_there and self._is_in_place()

    @contextlib.contextmanager
    def _problem_kept(self):
        try:
            yield
        except Exception as e:  # of Orbax, tensorstore, JAX and clients of stores
            # The folder of the checkpoints was there: its disk may be away.
            if not retry.is_fault(e) and not isinstance(e, FileNotFoundError):
                raise
            self._problem = self._problem or e

    def _why(self):
        if self._problem:
            return retry.reason(self._problem)
        return "another process failed, or the workdir is gone or was taken over"

    def has_failed(self):
        """Whether the newest save failed; several processes find that out at their next save, but
        process 0 finds a complete checkpoint at once.
        """
        has_ended = self._saving and not self._manager.is_saving_in_progress()
        if jax.process_count() == 1:
            if self._saving and (self._problem or has_ended):
                self.finish()
        elif has_ended and self._looked_at != self._saving and jax.process_index() == 0:
            self._looked_at = self._saving
            with contextlib.suppress(Exception):  # the next save looks again
                if self._is_there(self._saving):
                    self.saved = self._saving
        return self._failed

    def close(self):
        """Waits for the save in the background. Raises `MachineFault` if it failed."""
        if not self.finish():
            raise MachineFault(f"the newest checkpoint cannot be saved: {self._why()}")
        if self._manager:
            self._manager.close()

    def restore_newest(self, abstract_state, data_iterator, check_place=lambda: None):
        """Restores the newest checkpoint that is not damaged; returns `(step, state, progress)`.

        Damaged ones are moved to `damaged_checkpoints`, with a warning. `data_iterator` is moved to
        its position. `check_place` waits while the whole workdir is gone, and raises an exception
        if it does not come back, so that no checkpoint counts as damaged for that reason. Raises
        like `restore`, but `UserError` if all checkpoints are damaged.
        """
        looked_again = None  # the step that was read once more
        while True:
            with together():
                steps = self.steps()
            # A network disk may show other processes a checkpoint that was moved.
            step, n_steps = gathered(max(steps, default=0))[0], gathered(len(steps))[0]
            try:
                state, progress, position = self.restore(step, abstract_state)
            except Damaged as e:
                looked = time.monotonic()
                with together():
                    check_place()
                was_there = all_agree(time.monotonic() - looked < retry.SECOND_LOOK / 4)
                if not was_there and step != looked_again:
                    looked_again = step
                    continue
                if n_steps < 2:
                    raise UserError(
                        f"checkpoint {self._path(step)} is damaged ({e}), and there is no other; "
                        "--start-over begins anew"
                    ) from e
                self._set_aside(step, e)
                continue
            data_iterator.set_state(position)
            data_iterator.start_prefetch()
            return step, state, progress

    def _set_aside(self, step, problem):
        with together():
            if jax.process_index() == 0:
                target = unused(self.directory.with_name(DAMAGED) / str(step))
                move(self._path(step), target)
                log.warning(
                    f"checkpoint of step {step} is damaged ({problem}) and was moved to {target}"
                )

    def restore(self, step, abstract_state):
        """`(state, progress, position in the data)` of a step. `abstract_state` has shapes, dtypes
        and shardings. Raises like `read_checkpoint`.
        """
        state, run = read_checkpoint(self._path(step), vars(abstract_state))
        state = dataclasses.replace(abstract_state, **state)
        progress = Progress(**{name: run["progress"].get(name) for name in PROGRESS})
        return state, progress, run["data"]

    def restore_model(self, step, abstract_state):
        """`(params, routing_state)` of a step, the parts of a state that evaluation needs. Raises
        like `read_checkpoint`, but `UserError` for a damaged checkpoint.
        """
        wanted = {name: getattr(abstract_state, name) for name in ("params", "routing_state")}
        try:
            model, _ = read_checkpoint(self._path(step), wanted)
        except Damaged as e:
            steps = self.steps()
            if step not in steps:  # by the training, which keeps the newest ones
                raise UserError(
                    f"checkpoint {self._path(step)} was deleted while it was read; try again, or "
                    "train with a larger checkpoint.keep"
                ) from e
            others = [other for other in steps if other != step]
            hint = f"--step={others[-1]} evaluates another" if others else "there is no other"
            raise UserError(f"checkpoint {self._path(step)} is damaged ({e}); {hint}") from e
        return model["params"], model["routing_state"]

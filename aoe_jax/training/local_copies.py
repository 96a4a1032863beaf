"""Copies of the state on a disk of each host, written between two checkpoints. A run that is
started again on the same hosts goes on from them.

Orbax's emergency checkpoints would also survive the loss of a host, but they need a replica of the
state on every slice, and keep neither the position in the data nor the figures of the run.
"""

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from aoe_jax.config.run import Config
from aoe_jax.distributed import gathered
from aoe_jax.faults import Tolerated
from aoe_jax.paths import is_remote
from aoe_jax.training.checkpoint import Manager, Progress, restored
from aoe_jax.training.checkpoint_content import beside_arrays

_KEEP = 2  # copies; processes may be one save apart when they end


class LocalCopies:
    """The copies that this process writes: its own part of the state, without waiting for others.

    They are in `checkpoint.local_path/WORKDIR-HASH/process_N/RUN/STEP`. RUN is a hash of the time
    when the run began, its configuration and its number of processes; a run that differs in one of
    them does not find the copies. A copy that cannot be written is left out, with a warning. All
    processes call each method together.
    """

    def __init__(self, workdir: Path, config: Config, began: float | None, anew: bool):
        """Finds copies of the run that `began` at this time; None: it begins now.

        With `anew`, they are deleted: the run goes back, or begins again.
        """
        whole = workdir if is_remote(workdir) else workdir.absolute()
        place = f"{workdir.name}-{_hash(str(whole))}"
        here = f"process_{jax.process_index()}"
        self._own = Path(config.checkpoint.local_path) / place / here
        self._config, self._manager = config, None
        self._saving, self._problem = False, None
        self._tolerated = Tolerated(f"a local copy in {self._own}")
        self._name_after(began)
        if anew:
            shutil.rmtree(self._own, ignore_errors=True)

    def _name_after(self, began):
        # All use the time that process 0 has read.
        began = gathered(int(began or 0) % 2**31)[0]
        run = _hash(f"{began} {self._config} {jax.process_count()}")
        self.directory = self._own / run

    def newest(self) -> int:
        """The newest step of which every process has a copy; 0 if there is none."""
        steps = []
        with contextlib.suppress(OSError):
            steps = sorted(ocp.utils.checkpoint_steps(self.directory))[-_KEEP:]
        steps = [0] * (_KEEP - len(steps)) + steps
        of_processes = zip(*[gathered(step) for step in steps], strict=True)
        return max(set(steps).intersection(*of_processes), default=0)

    def restore(self, step: int, abstract_state):
        """`(state, progress, position in the data)` of a step, like `Checkpoints.restore`."""
        return restored(self.directory / str(step), abstract_state)

    def open(self, began: float, step: int):
        """Begins to write, in a run that `began` at this time and goes on from a step. All copies
        but those of this step are deleted.
        """
        self._name_after(began)
        kept = self.directory / str(step)
        with self._tolerated:
            for other in [*self._own.glob("*"), *self.directory.glob("*")]:
                if other not in (self.directory, kept):
                    shutil.rmtree(other)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = self._new_manager()

    def _new_manager(self):
        """Orbax's manager of the copies; the unfinished copies of another are deleted."""
        for half in ocp.utils.tmp_checkpoints(self.directory):
            shutil.rmtree(half.get())
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None,
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"local_{jax.process_index()}",
        )
        # Every process writes all pieces on its devices, also those that others have.
        pieces = ocp.type_handlers.ArrayHandler(
            primary_host=None, replica_id=None, use_replica_parallel=False
        )
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, pieces))
        state = ocp.PyTreeCheckpointHandler(
            multiprocessing_options=alone, type_handler_registry=registry
        )
        run = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        options = ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=_KEEP,
            multiprocessing_options=alone,
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {"state": state, "run": run}
        return Manager(self.directory, item_handlers=handlers, options=options)

    def save(self, step: int, state, data_state, progress: Progress):
        """Writes a copy in the background; returns as soon as `state` may be donated. Call `wait`
        first.
        """
        arrays = vars(state)
        run = beside_arrays(arrays, data_state, dataclasses.asdict(progress))
        if self._manager is None:
            return
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(run))
        self._saving, self._problem = True, None
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as e:  # `wait` reports it
            self._problem = e

    def wait(self):
        """Waits for the copy in the background, so that no process is ahead by two copies."""
        if not self._saving:
            return
        self._saving = False
        with self._tolerated:
            try:
                if self._problem:
                    raise self._problem
                self._manager.wait_until_finished()
            except Exception:
                self._manager = self._new_manager()
                raise

    def delete(self):
        """Deletes the copies of a finished run."""
        self.wait()
        shutil.rmtree(self._own, ignore_errors=True)


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]

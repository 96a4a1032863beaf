"""Copies of the state on a disk of each host, written between two checkpoints. A run that is
started again on the same hosts goes on from them.

Orbax's emergency checkpoints would also survive the loss of a host, but they need a replica of the
state on every slice, and keep neither the position in the data nor the figures of the run.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config.run import Config
from aoe_jax.distributed import gathered, together
from aoe_jax.storage.files import COUNT, misfit
from aoe_jax.storage.paths import is_remote
from aoe_jax.storage.retry import reason
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.checkpoint_content import PROGRESS
from aoe_jax.training.fingerprints import by_path

log = logging.getLogger(__name__)

_KEEP = 3  # copies; a process with a slow disk may be two behind when the processes end
_RUN = {"nonce": COUNT, "data": {}, "progress": PROGRESS}


class LocalCopies:
    """The copies of one process: the pieces of the state that are on its devices.

    They are the files `checkpoint.local_path/WORKDIR-HASH/process_N/STEP-RUN.npz`. RUN is a hash of
    history, configuration, data and number of processes: a run that differs in one of them does not
    find the copies. Saving waits for no other process; a copy that cannot be written leaves a
    warning. `saved` is the step of the newest copy that this process has written or read, else 0.
    """

    def __init__(self, workdir: Path, config: Config, history: int, data: list, nonce: int):
        """Finds the copies; all processes call it together. `config` has the mesh, `history` is the
        number in `heartbeat.json` that changes when the run goes back, `data` the identities of the
        token stores, and `nonce` a number of this start of the run, the same in all processes.
        """
        self._root, self._nonce, self.saved = Path(config.checkpoint.local_path), nonce, 0
        name = workdir if is_remote(workdir) else workdir.absolute()
        place = f"{workdir.name}-{_hash(name):07x}"
        self._folder = self._root / place / f"process_{jax.process_index()}"
        run = gathered(_hash(f"{history} {config} {data} {jax.process_count()}"))[0]
        self._run = f"{run:07x}"
        self._writer, self._writing, self._failing = ThreadPoolExecutor(1), None, False

    def _file(self, step):
        return self._folder / f"{step}-{self._run}.npz"

    def _steps(self):
        try:
            names = os.listdir(self._folder)
        except OSError:
            return []
        found = (re.fullmatch(rf"(\d{{1,9}})-{self._run}\.npz", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> int:
        """The newest step that every process has copied, else 0; all processes call it together."""
        steps = self._steps()[-_KEEP:]
        steps = [0] * (_KEEP - len(steps)) + steps
        of_processes = zip(*[gathered(step) for step in steps], strict=True)
        return max(set(steps).intersection(*of_processes), default=0)

    def restore(self, step: int, abstract_state):
        """`(state, progress, position in the data)` of a step, or None if a process cannot read its
        copy; all processes call it together. `abstract_state` has shapes, dtypes and shardings.
        """
        with together():  # the device may lack memory
            nonce, found = self._read(step, abstract_state)
        nonces = {*gathered(nonce)}
        # If hosts have swapped their process numbers and back, copies may be of several starts.
        if found is None or len(nonces) > 1:
            return None
        self.saved = step
        return found

    def _read(self, step, abstract_state):
        try:
            # numpy checks the sum of each piece that it reads.
            with self._file(step).open("rb") as file, np.load(file) as pieces:
                run = json.loads(pieces["run"].tobytes())
                if problem := misfit(run, _RUN):
                    raise ValueError(problem)
                state = jax.tree_util.tree_map_with_path(
                    lambda path, a: _array(pieces, jax.tree_util.keystr(path), a),
                    vars(abstract_state),
                )
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as e:  # numpy and zipfile raise exceptions of many kinds
            log.warning(f"the local copy {self._file(step)} cannot be read ({reason(e)})")
            return 0, None
        state = dataclasses.replace(abstract_state, **state)
        return run["nonce"], (state, Progress(**run["progress"]), run["data"])

    def begin(self, step: int):
        """Begins to write in a run that goes on from `step`: all copies but that are deleted."""
        try:
            for path in self._folder.glob("*"):
                if path != self._file(step):
                    path.unlink(missing_ok=True)
        except OSError as e:
            self._warn(e)

    def save(self, step: int, state, data_state, progress: Progress, sync: Callable):
        """Writes a copy in the background; returns as soon as `state` may be donated. `sync()` must
        put the figures so far into the workdir, because a copy must not be ahead of them.
        """
        self.wait()
        run = {"nonce": self._nonce, "data": data_state, "progress": dataclasses.asdict(progress)}
        try:
            sync()
            pieces = {"run": np.frombuffer(json.dumps(run).encode(), np.uint8)} | _pieces(state)
            self._writing = self._writer.submit(self._write, step, pieces)
        except Exception as e:
            self._warn(e)

    def _write(self, step, pieces):
        if not self._root.is_dir():  # its disk may not be mounted
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {self._root}")
        self._folder.mkdir(parents=True, exist_ok=True)
        target, partial = self._file(step), self._file(step).with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **pieces)
            os.replace(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        for older in self._steps()[:-_KEEP]:
            self._file(older).unlink(missing_ok=True)
        return step

    def wait(self):
        """Waits for the copy in the background."""
        if self._writing is None:
            return
        try:
            self.saved, self._failing = self._writing.result(), False
        except Exception as e:
            self._warn(e)
        self._writing = None

    def _warn(self, error):
        if not self._failing:
            what = f"a local copy in {self._folder} cannot be written ({reason(error)})"
            log.warning(f"{what}; the run goes on")
        self._failing = True

    def delete(self):
        """Deletes the copies of a run that has finished."""
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other processes of this host may have copies there
            self._folder.parent.rmdir()


def _hash(text):
    return int(hashlib.sha256(str(text).encode()).hexdigest()[:7], 16)


def _name(path, index, shape):
    """The name of a piece: the path of its array in the state, and where the piece begins."""
    return f"{path}{[part.indices(n)[0] for part, n in zip(index, shape, strict=True)]}"


def _pieces(state):
    """The pieces of the state on this process's devices, each once, by name, as numpy arrays."""
    found = {}
    for path, array in by_path(vars(state)).items():
        for shard in array.addressable_shards:
            found[_name(path, shard.index, array.shape)] = shard.data
    for piece in found.values():
        piece.copy_to_host_async()
    # On CPU, device_get returns the memory of the device, which may be donated.
    host = {name: np.array(jax.device_get(piece)) for name, piece in found.items()}
    # As unsigned integers, because numpy does not know bfloat16.
    return {name: piece.view(f"u{piece.itemsize}") for name, piece in host.items()}


def _array(pieces, path, wanted):
    def piece(index):
        return pieces[_name(path, index, wanted.shape)].view(wanted.dtype)

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, piece)

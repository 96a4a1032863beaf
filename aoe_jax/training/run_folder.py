"""The directory of a run while it trains: who owns it, and where its figures are written."""

import contextlib
import errno
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax

from aoe_jax.distributed import see_the_same, together
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage.files import write_or_refuse
from aoe_jax.storage.lease import leased, token_of
from aoe_jax.storage.paths import Mirror, is_remote
from aoe_jax.storage.retry import patiently
from aoe_jax.training.workdir import set_aside


@dataclass(frozen=True)
class Start:
    """How a run begins in a workdir that has files of a run or of another process."""

    over: bool = False  # begin anew; the files of the run before are set aside
    go_back: int | None = None  # begin from the checkpoint of this step; newer files are set aside
    take_over: bool = False  # do not wait for an owner that may still run
    resume_only: bool = False  # never begin: the disk of the run may not be mounted


class RunFolder:
    """A workdir that process 0 owns and all processes see.

    `figures` is the folder of `metrics.jsonl`, `tensorboard/`, `wandb/` and `profile/`: the workdir
    or, if that is in an object store, a temporary folder that `upload` copies there. `nonce` is
    that of the owner, in all processes.
    """

    def __init__(self, workdir: Path):
        """Touches no file before `open`."""
        self.figures, self.workdir = workdir, workdir
        self.nonce = self._owner = self._mirror = None

    def open(self, start: Start, held: contextlib.ExitStack):
        """Owns the workdir until `held` is closed, and sets old files aside if `start` says so.
        Raises `InUse` if another process owns it, `UserError` if a process does not see it, and
        `MachineFault` if there is no run to resume.
        """
        workdir, is_main = self.workdir, jax.process_index() == 0
        with together():
            if is_main:
                self._owner = held.enter_context(leased(workdir, "workdir", start.take_over))
        self.nonce = see_the_same(
            self._owner and _number(self._owner.token),
            lambda: _number(token_of(workdir)),
            f"--workdir={workdir}",
        )
        with together():
            if not is_main and not is_remote(workdir):  # every process saves its part of the state
                file = workdir / f".process_{jax.process_index()}"
                write_or_refuse(workdir, "workdir", lambda: (file.touch(), file.unlink()))
            if is_main and start.resume_only and not (workdir / "heartbeat.json").exists():
                raise MachineFault(f"{workdir}/heartbeat.json is gone; is its disk mounted?")
            if is_main and (start.over or start.go_back is not None):
                set_aside(workdir, start.go_back)
            if is_main and is_remote(workdir):
                self.figures = Path(held.enter_context(tempfile.TemporaryDirectory()))
                for name in ("metrics.jsonl", "wandb.json"):
                    patiently(f"{workdir / name} cannot be read", lambda: self._fetch(name))
                self._mirror = Mirror(self.figures, workdir)

    def _fetch(self, name):
        if (file := self.workdir / name).exists():
            (self.figures / name).write_bytes(file.read_bytes())

    def check_owner(self):
        """Calls `Lease.check` in process 0. It must come before files are replaced: a disk that was
        not mounted at the start may have the run of another process.
        """
        if self._owner:
            self._owner.check()

    def check_in_place(self):
        """Checks in every process that it sees the file of the owner; raises like `Lease.check`."""
        patiently(f"{self.workdir} cannot be read", self._see_owner)

    def _see_owner(self):
        found = token_of(self.workdir)
        if found is None:
            raise OSError(errno.ESTALE, "the file of its owner is gone; is its disk mounted?")
        if _number(found) != self.nonce:
            raise UserError(f"{self.workdir} was taken over by another process")

    def is_in_place(self):
        """Whether this is process 0 and the workdir is the one that it owns, not another disk."""
        return self._owner is not None and token_of(self.workdir) == self._owner.token

    def upload(self):
        """Copies the figures so far to an object store; raises like `Lease.check`."""
        if self._mirror:
            self.check_owner()
            self._mirror.upload()

    def release(self):
        """Gives the workdir up, in a process that ends without closing `held`."""
        if self._owner:
            self._owner.release()


def _number(token):
    return token and zlib.crc32(token.encode()) >> 1

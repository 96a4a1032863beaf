"""Runs commands in processes of their own, several at a time; one that fails doesn't stop the
others.
"""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aoe_jax.json_files import write_json
from aoe_jax.stopping import StopRequests

log = logging.getLogger(__name__)

POLL_SECONDS, SAY_SECONDS = 0.2, 60.0
_PINNED = (sys.executable, "-I", "-S", str(Path(__file__).with_name("pinned.py")))


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: tuple[str, ...]
    log: Path  # stdout and stderr, appended
    outcome: Path  # a JSON file, written when it ends: `status` and `last_line`
    folder: Path  # what the command locks while it works there
    cost: float  # in any unit, for the estimate of the time left
    progress: Callable[[], float]  # the fraction that is done


@dataclass(frozen=True)
class Slot:
    """Where one job at a time runs."""

    core: int | None = None  # None: any
    environment: dict[str, str] = field(default_factory=dict)  # that its device is chosen by


class _Running:
    """A job with a process."""

    def __init__(self, job, slot, environment):
        self.job, self.slot = job, slot
        self.before = job.progress()  # what earlier processes have done
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.outcome.unlink(missing_ok=True)
        with job.log.open("a") as file:
            file.write(f"$ {' '.join(job.command)}\n")
            file.flush()
            self.process = subprocess.Popen(
                [*_PINNED, "any" if slot.core is None else str(slot.core), *job.command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment | os.environ | slot.environment,
                start_new_session=True,  # Ctrl-C is for us to pass on, once
            )

    def ended(self):
        """Whether the command has ended; notes its outcome."""
        status = self.process.poll()
        if status is not None:
            write_json(self.job.outcome, {"status": status, "last_line": self.last_words()})
        return status is not None

    def last_words(self):
        """The last line of its log, and whether it could say no more, as where memory ran out."""
        status, line = self.process.returncode, last_line(self.job.log)
        return f"killed by signal {-status}, after: {line}" if status < 0 else line


def last_line(path: Path):
    """The last line of a log that says something."""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _is_free(folder):
    """Whether no process of before, killed or asked to stop with its parent, is still at work in a
    folder.
    """
    if not folder.is_dir():
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        return True
    finally:
        os.close(descriptor)
    return True


def run_jobs(jobs: list[Job], slots: list[Slot], environment: dict[str, str], stop: StopRequests):
    """Runs jobs in order, as many at a time as there are slots, each in one.

    Every job leaves its log and its outcome. Says now and then how far all are. `environment` has
    defaults for variables that aren't set.

    Raises:
      Stopped: `stop` was asked; the jobs at work were asked too and have ended.
    """
    waiting, running, free = list(jobs), [], list(slots)
    progress = _Progress(jobs)
    with stop.between_steps(several=False):
        try:
            while waiting or running:
                if stop.asked():
                    raise stop.end("what is done is saved; the same command goes on from there")
                for job in [job for job in waiting if _is_free(job.folder)][: len(free)]:
                    waiting.remove(job)
                    running.append(_Running(job, free.pop(0), environment))
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    free.append(one.slot)
                    progress.end(one)
                progress.say(running)
                time.sleep(POLL_SECONDS)
        finally:
            _stop_all(running)


def _stop_all(running):
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.wait()


class _Progress:
    """How far all jobs are, in words."""

    def __init__(self, jobs):
        self._left, self._n = {job.name: job.cost for job in jobs}, len(jobs)
        self._gained, self._failed = 0.0, 0
        self._started = self._said = time.monotonic()

    def end(self, one):
        """Takes in that a job has ended."""
        self._gained += one.job.cost * max(one.job.progress() - one.before, 0)
        del self._left[one.job.name]
        status = one.process.returncode
        self._failed += status != 0
        if status:
            log.warning(
                "%s failed with status %d: %s; its log is %s",
                one.job.name,
                status,
                one.last_words(),
                one.job.log,
            )
        self._say(f"{one.job.name} has ended", [])

    def say(self, running):
        """Says how far all are, if that was long ago."""
        if time.monotonic() - self._said > SAY_SECONDS:
            self._say(
                "at work: "
                + ", ".join(f"{one.job.name} {one.job.progress():.0%}" for one in running),
                running,
            )

    def _say(self, what, running):
        self._said = time.monotonic()
        gained = self._gained + sum(
            one.job.cost * max(one.job.progress() - one.before, 0) for one in running
        )
        done = sum(one.job.cost * one.job.progress() for one in running)
        left = ""
        if gained and self._left:
            seconds = (
                (sum(self._left.values()) - done) / gained * (time.monotonic() - self._started)
            )
            left = (
                f", about {seconds / 3600:.1f} h left"
                if seconds > 5400
                else f", about {seconds / 60:.0f} min left"
            )
        failed = f", {self._failed} of them failed" if self._failed else ""
        log.info("%d of %d ended%s%s; %s", self._n - len(self._left), self._n, failed, left, what)

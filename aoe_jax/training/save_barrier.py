"""A barrier for several processes that save a checkpoint together."""

import itertools
import time

import jax
import orbax.checkpoint as ocp
from jax._src import distributed

_LONGEST_PAUSE = 1.0  # seconds between two looks
_numbers = itertools.count()


class SaveBarrier:
    """A barrier for `orbax.checkpoint.AsyncOptions` that fails soon after a write has failed.

    Processes wait for each other at "async_write_complete" and "async_commit_complete". A process
    whose write failed skips both, and Orbax's own barrier would let the others wait until the save
    times out. But every process reaches "set_value_start" when its background save ends, whether it
    succeeded or not. A process that waits at one of the first two points therefore polls whether
    another process has already ended this save.
    """

    def __init__(self):
        """All processes make their barriers in the same order: the number is part of the keys."""
        self._name, self._client = f"saves_{next(_numbers)}", distributed.global_state.client
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._changes = 0  # calls with "set_value_start": one when a save begins, one when it ends

    def __call__(self, *, key: str, timeout_ms: int):
        """Waits until every process has called it with this key. Raises `TimeoutError` if another
        process has ended this save early, or after `timeout_ms` milliseconds.
        """
        if key.endswith("set_value_start"):
            self._changes += 1
            if self._changes % 2 == 0:
                self._count(f"ended/{self._changes // 2}", 1)
        if "async_" not in key:
            self._wait(key=key, timeout_ms=timeout_ms)
            return
        save = (self._changes + 1) // 2
        deadline, pause = time.monotonic() + timeout_ms / 1000, 0.01
        self._count(f"{key}/{save}", 1)
        while True:
            # This is read first: a save that succeeds ends only after every process was here.
            has_ended = self._count(f"ended/{save}", 0)
            if self._count(f"{key}/{save}", 0) == jax.process_count():
                return
            if has_ended or time.monotonic() > deadline:
                raise TimeoutError("another process failed in this save, or did not finish in time")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _count(self, name, more):
        return self._client.key_value_increment(f"{self._name}/{name}", more)

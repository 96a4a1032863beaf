"""Where several processes wait for each other in a save of Orbax."""

import time

import jax
import orbax.checkpoint as ocp
from jax._src import distributed

_LONGEST_PAUSE = 1.0  # seconds between two looks


class SaveBarrier:
    """A barrier for `orbax.checkpoint.AsyncOptions` that fails at once in a save that has failed.

    A process whose write fails does not come to the points "async_write_complete" and
    "async_commit_complete", and Orbax's own barrier would wait for it until the time-out of the
    save. But it comes to the point at which every save ends, whatever became of it; who waits at
    one of the other two looks whether a process is there already.
    """

    def __init__(self, name: str):
        """`name` is the same in all processes, and new for every checkpoint manager."""
        self._name, self._client = name, distributed.global_state.client
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._changes = 0  # Orbax notes when a save begins and when it ends: two for each save

    def __call__(self, *, key: str, timeout_ms: int):
        """Waits until all processes have called it with the key; raises `TimeoutError` if another
        process has ended the save before, or after the time in milliseconds.
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
            has_ended = self._count(f"ended/{save}", 0)  # before the count of those that are here
            if self._count(f"{key}/{save}", 0) == jax.process_count():
                return
            if has_ended or time.monotonic() > deadline:
                raise TimeoutError("another process has not saved its part")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _count(self, name, more):
        return self._client.key_value_increment(f"{self._name}/{name}", more)

"""A barrier for several processes that save a checkpoint together."""

import itertools
import threading

import orbax.checkpoint as ocp

_POINTS = ("async_write_complete", "async_commit_complete")
_GRACE = 10_000  # milliseconds from the moment when the last process has reached a point
_numbers = itertools.count()


class SaveBarrier:
    """A barrier for `orbax.checkpoint.AsyncOptions` that fails soon after a write has failed.

    Processes wait for each other at two points, "async_write_complete" and "async_commit_complete".
    A process whose write failed skips them, and Orbax's own barrier would let the others wait until
    the save times out. But every process reaches "set_value_start" when its background save ends,
    whether it succeeded or not. There it releases the others from the points that it skipped. A
    second barrier at each point, without such processes, tells the others that the save failed.
    """

    def __init__(self):
        """All processes make their barriers in the same order: the number is part of the keys."""
        self._name, self._wait = f"saves_{next(_numbers)}", ocp.multihost.get_barrier_sync_fn()
        self._changes = 0  # calls with "set_value_start": one when a save begins, one when it ends
        self._reached, self._lock = set(), threading.Lock()

    def __call__(self, *, key: str, timeout_ms: int):
        """Waits until every process has called it with this key. Raises an exception if a process
        has failed in this save, or after `timeout_ms` milliseconds.
        """
        if key.endswith("set_value_start"):
            self._changes += 1
            if self._changes % 2 == 0:
                for point in _POINTS:
                    self._reach(point, timeout_ms)
        for point in _POINTS:
            if point in key:
                if not (name := self._reach(point, timeout_ms)):
                    raise TimeoutError("another thread has ended this save")
                self._wait(key=f"{name}/good", timeout_ms=_GRACE)
                return
        self._wait(key=key, timeout_ms=timeout_ms)

    def _reach(self, point, timeout_ms):
        """Waits for all processes at a point of this save, and returns the name of the barrier;
        None, at once, if this process has been there.
        """
        name = f"{self._name}/{(self._changes + 1) // 2}/{point}"
        with self._lock:
            if name in self._reached:
                return None
            self._reached.add(name)
        self._wait(key=name, timeout_ms=timeout_ms)
        return name

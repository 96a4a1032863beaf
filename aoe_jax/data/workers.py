"""Processes that work through a list of tasks; one that dies is replaced and its task repeated."""

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence

from aoe_jax.errors import UserError

_TRIES = 3  # for each task
_POLL_SECONDS = 0.2

# Forked children would share locks with threads that they don't have.
_spawning = multiprocessing.get_context("spawn")


class Workers:
    """A number of processes. Leaving the `with` statement kills them, and if this process is
    killed, they end after their task.
    """

    def __init__(self, count: int, set_up: Callable, arguments: Sequence):
        """Each process calls `set_up(*arguments)` once, then the result of that with every task."""
        self._count, self._start = count, (set_up, arguments)
        self._alive: list[tuple] = []  # process and connection

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception):
        for process, connection in self._alive:
            process.kill()
            process.join()
            connection.close()

    def run(
        self, tasks: Sequence, name: Callable[[object], str], warn: Callable[[str], None]
    ) -> Iterator[tuple | None]:
        """Yield `(task, result)` in the order in which they are done, and None every now and then.

        Args:
            tasks: hashable values, begun in this order.
            name: the name of a task, for messages.
            warn: receives a message if a process has died.

        Raises:
            UserError: a task raised it, or three processes died at a task.
            RuntimeError: a task raised anything else; the message has its traceback.
        """
        waiting, busy, tries = list(reversed(tasks)), {}, {}
        idle = [self._new() for _ in range(min(self._count, len(tasks)))]
        while waiting or busy:
            while waiting and idle:
                worker, task = idle.pop(), waiting.pop()
                busy[worker[1]] = worker, task
                with contextlib.suppress(OSError):  # a dead process is noticed below
                    worker[1].send(task)
            yield None
            for connection in multiprocessing.connection.wait(list(busy), _POLL_SECONDS):
                worker, task = busy.pop(connection)
                try:
                    kind, result = connection.recv()
                except (EOFError, OSError):
                    end = self._bury(worker)
                    tries[task] = tries.get(task, 0) + 1
                    if tries[task] == _TRIES:
                        raise UserError(
                            f"--processes={self._count}: {_TRIES} processes died at {name(task)}, "
                            f"the last one with {end}; if memory ran out, use fewer"
                        ) from None
                    warn(f"a process died at {name(task)} with {end}; another one takes its place")
                    idle.append(self._new())
                    waiting.append(task)
                    continue
                if kind == "mistake":
                    raise UserError(result)
                if kind == "failure":
                    raise RuntimeError(f"at {name(task)}:\n{result}")
                idle.append(worker)
                yield task, result

    def _new(self) -> tuple:
        ours, theirs = _spawning.Pipe()
        process = _spawning.Process(target=_work, args=(theirs, *self._start), daemon=True)
        process.start()
        theirs.close()  # so that `ours` is at its end when the process dies
        self._alive.append((process, ours))
        return process, ours

    def _bury(self, worker: tuple) -> str:
        """Forget a dead process; returns how it ended."""
        self._alive.remove(worker)
        process, connection = worker
        process.join()
        connection.close()
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(connection, set_up: Callable, arguments: Sequence):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    do = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            task = connection.recv()
            try:
                do = do or set_up(*arguments)
                answer = "done", do(task)
            except UserError as error:
                answer = "mistake", str(error)
            except Exception:
                answer = "failure", traceback.format_exc()
            connection.send(answer)

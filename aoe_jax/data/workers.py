"""Processes that work through a list of tasks; one that dies is replaced and its task repeated."""

import contextlib
import logging
import multiprocessing
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait

from aoe_jax.errors import UserError

logger = logging.getLogger(__name__)

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
        self._alive: dict[Connection, multiprocessing.Process] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception):
        for connection, process in self._alive.items():
            process.kill()
            process.join()
            connection.close()

    def run(self, tasks: Mapping[Hashable, str]) -> Iterator[tuple | None]:
        """Yield `(task, result)` in the order in which they are done, and None every now and then.

        `tasks` has the name of each task for messages; they are begun in order.

        Raises:
            UserError: a task raised it, or three processes died at a task.
            RuntimeError: a task raised anything else; the message has its traceback.
        """
        waiting, busy, deaths = list(reversed(tasks)), {}, Counter()
        idle = [self._new() for _ in range(min(self._count, len(tasks)))]
        while waiting or busy:
            while waiting and idle:
                connection, task = idle.pop(), waiting.pop()
                busy[connection] = task
                with contextlib.suppress(OSError):  # a dead process is noticed below
                    connection.send((task, tasks[task]))
            yield None
            for connection in wait(list(busy), _POLL_SECONDS):
                task = busy.pop(connection)
                try:
                    result, error = connection.recv()
                except (EOFError, OSError):
                    end = self._bury(connection)
                    deaths[task] += 1
                    if deaths[task] == _TRIES:
                        raise UserError(
                            f"--processes={self._count}: {_TRIES} processes died at {tasks[task]}, "
                            f"the last one with {end}; if memory ran out, use fewer"
                        ) from None
                    logger.warning(
                        f"a process died at {tasks[task]} with {end}; another one takes its place"
                    )
                    idle.append(self._new())
                    waiting.append(task)
                    continue
                if error:
                    raise error
                idle.append(connection)
                yield task, result

    def _new(self) -> Connection:
        ours, theirs = _spawning.Pipe()
        process = _spawning.Process(target=_work, args=(theirs, *self._start), daemon=True)
        process.start()
        theirs.close()  # so that `ours` is at its end when the process dies
        self._alive[ours] = process
        return ours

    def _bury(self, connection: Connection) -> str:
        """Forget a dead process; returns how it ended."""
        process = self._alive.pop(connection)
        process.join()
        connection.close()
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(connection: Connection, set_up: Callable, arguments: Sequence):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    do = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            task, name = connection.recv()
            try:
                do = do or set_up(*arguments)
                answer = do(task), None
            except UserError as error:
                answer = None, error
            except Exception:
                answer = None, RuntimeError(f"at {name}:\n{traceback.format_exc()}")
            connection.send(answer)

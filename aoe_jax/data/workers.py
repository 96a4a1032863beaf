"""Processes that work through a list of tasks; one that dies is replaced and its task repeated."""

import contextlib
import logging
import multiprocessing
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait

from aoe_jax.errors import Failure, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.retry import patiently_if_allowed

logger = logging.getLogger(__name__)

_TRIES = 3  # attempts at a task
_POLL_SECONDS = 0.2

# Forked children would share locks with threads that they do not have.
_spawning = multiprocessing.get_context("spawn")


def work_through(
    tasks: Mapping[Hashable, str], count: int, set_up: Callable, arguments: Sequence
) -> Iterator[tuple | None]:
    """Yields `(task, result)` in the order in which they are done, and None every now and then.

    Each of `count` processes calls `set_up(*arguments)` once, then the result of that with every
    task. `tasks` has the name of each task for messages; they are begun in order. Closing the
    iterator kills the processes; if this process is killed, they end after their task.

    Raises a `Failure` of a task, `UserError` if three processes died at a task, and `RuntimeError`
    with the traceback if a task raised anything else.
    """
    waiting, busy, deaths = list(reversed(tasks)), {}, Counter()
    alive: dict[Connection, multiprocessing.Process] = {}

    def start() -> Connection:
        ours, theirs = _spawning.Pipe()
        args = theirs, set_up, arguments, retry.retry_seconds
        process = _spawning.Process(target=_work, args=args, daemon=True)
        process.start()
        theirs.close()  # so that `ours` is at its end when the process dies
        alive[ours] = process
        return ours

    try:
        idle = [start() for _ in range(min(count, len(tasks)))]
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
                    end = _end_of(alive.pop(connection))
                    deaths[task] += 1
                    if deaths[task] == _TRIES:
                        raise UserError(
                            f"--processes={count}: {_TRIES} processes died at {tasks[task]}, the "
                            f"last one with {end}; if memory ran out, use fewer"
                        ) from None
                    logger.warning(
                        f"a process died at {tasks[task]} with {end}; another one takes its place"
                    )
                    idle.append(start())
                    waiting.append(task)
                    continue
                if error:
                    raise error
                idle.append(connection)
                yield task, result
    finally:
        for process in alive.values():
            process.kill()
            process.join()


def _end_of(process: multiprocessing.Process) -> str:
    process.join()
    code = process.exitcode
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(connection: Connection, set_up: Callable, arguments: Sequence, retry_seconds: float):
    retry.retry_seconds = retry_seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    do = None
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            task, name = connection.recv()
            try:
                do = do or set_up(*arguments)
                what = f"{name} cannot be processed"
                answer = patiently_if_allowed(what, lambda: do(task)), None
            except Failure as error:
                answer = None, error
            except Exception:
                answer = None, RuntimeError(f"at {name}:\n{traceback.format_exc()}")
            connection.send(answer)

"""Processes that work through a list of tasks; one that dies is replaced, and its task begun again."""

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence

from aoe_jax.errors import UserError

_TRIES = 3  # of a task
_POLL_SECONDS = 0.2

_spawning = multiprocessing.get_context(
    "spawn"
)  # forked children would share locks of threads that they lack


class Workers:
    """A number of processes, alive within a `with` statement; leaving it kills them.

    They end by themselves, after their task, where this process is killed.
    """

    def __init__(self, count: int, set_up: Callable, arguments: Sequence):
        """Each process calls `set_up(*arguments)` once; what that returns is called with every
        task, which is hashable.
        """
        self._count, self._start = count, (set_up, arguments)
        self._alive: list[tuple] = []  # of process and connection

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception):
        for process, connection in self._alive:
            process.kill()
            process.join()
            connection.close()

    def run(
        self, tasks: Sequence, names: Callable[[object], str], died: Callable[[str], None]
    ) -> Iterator[tuple | None]:
        """Yield `(task, result)` as they come, and None now and then in between.

        Args:
            tasks: what the processes are given, one by one, in this order.
            names: of a task, for errors.
            died: is told, in words, when a process has died.

        Raises:
            UserError: a task did, or the processes that took it died three times.
            RuntimeError: a task raised anything else; its traceback is the message.
        """
        waiting, busy, tries = list(reversed(tasks)), {}, {}
        self._alive = [self._new() for _ in range(min(self._count, len(tasks)))]
        idle = list(self._alive)
        while waiting or busy:
            while waiting and idle:
                worker, task = idle.pop(), waiting.pop()
                busy[worker[1]] = worker, task
                with contextlib.suppress(OSError):  # of one that is dead, which shows below
                    worker[1].send(task)
            yield None
            for connection in multiprocessing.connection.wait(list(busy), _POLL_SECONDS):
                worker, task = busy.pop(connection)
                try:
                    kind, result = connection.recv()
                except (EOFError, OSError):
                    self._alive.remove(worker)
                    ended = self._end_of(*worker)
                    tries[task] = tries.get(task, 0) + 1
                    if tries[task] == _TRIES:
                        raise UserError(
                            f"--processes={self._count}: {_TRIES} processes died at {names(task)}, the last one with "
                            f"{ended}; if memory ran out, use fewer"
                        ) from None
                    died(
                        f"a process died at {names(task)} with {ended}; another one takes its place"
                    )
                    self._alive.append(self._new())
                    idle.append(self._alive[-1])
                    waiting.append(task)
                    continue
                if kind == "mistake":
                    raise UserError(result)
                if kind == "failure":
                    raise RuntimeError(f"at {names(task)}:\n{result}")
                idle.append(worker)
                yield task, result

    def _new(self) -> tuple:
        ours, theirs = _spawning.Pipe()
        process = _spawning.Process(target=_work, args=(theirs, *self._start), daemon=True)
        process.start()
        theirs.close()  # so that `ours` notices when the process dies
        return process, ours

    @staticmethod
    def _end_of(process, connection) -> str:
        process.join()
        connection.close()
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(connection, set_up: Callable, arguments: Sequence):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
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

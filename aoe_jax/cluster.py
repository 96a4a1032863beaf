"""Runs functions as tasks of a Ray cluster, with `--engine=ray` (https://docs.ray.io).

All nodes need this package and the same disk: tasks use the working directory of the command.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator

import ray
from ray.exceptions import RayError, RayTaskError

from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry

_REPEATS = 3  # of a task whose process or node is lost


def connect():
    """Connects to the cluster of `RAY_ADDRESS`, or of this node. Raises `UserError` without one."""
    of_terminate = signal.getsignal(signal.SIGTERM)
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        if host:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init("auto", ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")
    except (OSError, ValueError) as e:
        wanted = "start a cluster with `ray start --head`, or name one with RAY_ADDRESS"
        raise UserError(f"--engine=ray: no Ray cluster answers ({e}); {wanted}") from e
    signal.signal(signal.SIGTERM, of_terminate)  # Ray installed its own


def resources():
    """Returns Ray's options of a task: all TPU chips of a host, else one GPU, else one CPU core."""
    if chips := _most("TPU"):
        return {"resources": {"TPU": chips}}
    return {"num_gpus": 1} if _most("GPU") else {"num_cpus": 1}


def whole_node():
    """Returns Ray's options of a task that has the largest node for itself."""
    return resources() | {"num_cpus": _most("CPU")}


def _most(resource):
    return max(node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"])


def results(function: Callable, calls: Iterable[tuple], options: dict) -> Iterator[tuple]:
    """Runs `function(*call)` for each of `calls` as a task. Yields `(call, result)` as tasks end.

    Ray repeats a task up to 3 times if its process or node is lost. A caller that stops early must
    close the iterator: that raises `KeyboardInterrupt` in the tasks, and waits for their end.

    Raises:
      what `function` raises.
      MachineFault: if a task was lost too often.
    """
    task = ray.remote(_run).options(max_retries=_REPEATS, **options)
    there = os.getcwd(), retry.retry_seconds, function
    waiting = {task.remote(*there, *call): call for call in calls}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints which tasks and nodes were lost
            while waiting:
                [ended], _ = ray.wait([*waiting])
                result = ray.get(ended)
                yield waiting.pop(ended), result
    except RayTaskError as e:
        raise e.cause from None
    except RayError as e:
        what = f"--engine=ray: a task was lost {_REPEATS + 1} times"
        raise MachineFault(f"{what} ({type(e).__name__}); see the logs of Ray") from e
    finally:
        for left in waiting:
            ray.cancel(left)
        for left in waiting:
            ray.wait([left])


def _run(folder, retry_seconds, function, *call):
    os.chdir(folder)
    retry.retry_seconds = retry_seconds
    return function(*call)

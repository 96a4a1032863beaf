"""Runs functions as tasks of a Ray cluster, with `--engine=ray` (https://docs.ray.io).

All nodes need this package and the same disk: tasks use the working directory of the command.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from aoe_jax.errors import MachineFault, Terminated, UserError
from aoe_jax.storage import retry

log = logging.getLogger(__name__)

_REPEATS = 3  # how often a lost task is started again


def connect():
    """Connects to the cluster of `RAY_ADDRESS`, or of this node. Raises `UserError` without one."""
    of_command = signal.getsignal(signal.SIGTERM)
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        if host:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init("auto", ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")
    except (OSError, ValueError, RuntimeError) as e:  # or another version of Ray answers
        wanted = "start a cluster with `ray start --head`, or name one with RAY_ADDRESS"
        raise UserError(f"--engine=ray: no Ray cluster answers ({e}); {wanted}") from e
    signal.signal(signal.SIGTERM, of_command)  # Ray installed its own


def resources(whole_node=False):
    """Returns Ray's options of a task: all TPU chips of a host, else one GPU, else one CPU core.
    With `whole_node` the task also has all CPU cores of its node. Raises `UserError` if no node has
    any of these.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for device in ("TPU", "GPU", "CPU"):
        if has_device := [node for node in nodes if node.get(device)]:
            break
    else:
        raise UserError("--engine=ray: no node of the cluster has CPU cores; add one")
    largest = max(has_device, key=lambda node: (node[device], node.get("CPU", 0)))
    options = {"num_cpus": largest.get("CPU", 0) if whole_node else 1}
    if device == "TPU":
        return options | {"resources": {"TPU": largest["TPU"]}}
    return options | ({"num_gpus": 1} if device == "GPU" else {})


def results(function: Callable, calls: Sequence[tuple], options: dict) -> Iterator[tuple]:
    """Runs `function(*call)` for each of `calls` as a task. Yields `(call, result)` as tasks end.

    Ray repeats a task if its process or node is lost. A caller that stops early must close the
    iterator: this raises `KeyboardInterrupt` in the tasks, and waits for their end. Raises what
    `function` raises, and `MachineFault` if a task was lost too often.
    """
    log.info("%d tasks on a Ray cluster, each with %s", len(calls), options)
    of_command = signal.signal(signal.SIGTERM, _exit)  # Ray passes on no exception of ours
    task = ray.remote(_run).options(max_retries=_REPEATS, **options)
    there = os.getcwd(), retry.retry_seconds, function
    waiting = {task.remote(*there, *call): call for call in calls}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints which tasks and nodes were lost
            while waiting:
                [ended], _ = ray.wait([*waiting])
                result = ray.get(ended)
                yield waiting.pop(ended), result
    except SystemExit:
        raise Terminated("terminated") from None
    except RayTaskError as e:
        raise e.cause from e
    except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as e:
        what = "--engine=ray: a task was lost too often"
        raise MachineFault(f"{what} ({type(e).__name__}); see the logs of Ray") from e
    finally:
        for left in waiting:
            ray.cancel(left)
        for left in waiting:
            ray.wait([left])
        signal.signal(signal.SIGTERM, of_command)


def _exit(number, frame):
    signal.signal(number, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    sys.exit()


def _run(folder, retry_seconds, function, *call):
    os.chdir(folder)
    retry.retry_seconds = retry_seconds
    return function(*call)

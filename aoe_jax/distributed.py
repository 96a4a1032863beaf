"""Starts JAX in one or several processes: on a TPU pod, in a Slurm job, or with `--coordinator`."""

import contextlib
import logging
import os
import re
import sys
import threading
import time
import zlib

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import FailedElsewhere, MachineFault, UserError
from aoe_jax.storage.retry import reason, status_of

log = logging.getLogger(__name__)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the processes of a TPU slice, Slurm, Open MPI or Kubernetes job"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for processes started one by one"
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many processes, with --coordinator", 1)
_PROCESS = flags.DEFINE_integer("process", None, "process number from 0, with --coordinator", 0)
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "seconds to wait for other processes", 1)
_END_DELAY = 1.0  # seconds that a failing process waits for others to read its exit status


def start():
    """Joins the other processes if a flag asks for it. Call it before JAX is used.
    Raises `UserError` if the flags contradict each other or there is no cluster, and `MachineFault`
    if JAX fails or finds no device. If a process does not join in time, exits with status 5.
    """
    of_one = (_COORDINATOR, _PROCESSES, _PROCESS)
    given = [flag for flag in of_one if flag.value is not None]
    if given and _DISTRIBUTED.value:
        raise UserError(f"--distributed determines this value; leave out --{given[0].name}")
    if missing := [flag.name for flag in of_one if given and flag.value is None]:
        wanted = "give --coordinator, --processes and --process together"
        raise UserError(f"--{missing[0]} is missing; {wanted}")
    if given:
        is_address = re.fullmatch(r"[^:]+:[0-9]{1,5}", _COORDINATOR.value)
        wanted = "must be HOST:PORT of process 0, such as 10.0.0.1:12345, with a port below 65536"
        is_address = is_address and 0 < int(_COORDINATOR.value.partition(":")[2]) < 2**16
        require_flag(is_address, "coordinator", _COORDINATOR.value, wanted)
        below = f"must be below --processes={_PROCESSES.value}; processes count from 0"
        require_flag(_PROCESS.value < _PROCESSES.value, "process", _PROCESS.value, below)
    if given or _DISTRIBUTED.value:
        _initialize()
    if _backend() == "cpu" and jax.device_count() > 1:
        # The cache does not store the order of collectives, so cached programs deadlock on CPU.
        jax.config.update("jax_enable_compilation_cache", False)
        if jax.config.jax_compilation_cache_dir:
            log.warning("the compilation cache is off: it deadlocks on several CPU devices")


def _backend():
    try:
        return jax.default_backend()
    except (AssertionError, RuntimeError) as e:  # another process may be using the devices
        first_line = str(e).partition("\n")[0]
        why = first_line or "there is none, or JAX's plugin for it is missing"
        platforms = f"JAX_PLATFORMS={jax.config.jax_platforms or ''}"
        raise MachineFault(f"JAX finds no device ({platforms}): {why}") from e


def _initialize():
    address, timeout = _COORDINATOR.value, _JOIN_TIMEOUT.value
    timer = threading.Timer(timeout, _give_up)  # ends with a clear message before JAX aborts
    timer.daemon = True
    timer.start()
    # If the coordinator is an IP address or localhost, process 0 listens only at that address.
    bind = address if re.match(r"localhost:|[\d.]+:", address or "") else None
    settings = {"coordinator_bind_address": bind, "initialization_timeout": timeout + 60}
    try:
        jax.distributed.initialize(address, _PROCESSES.value, _PROCESS.value, **settings)
    except ValueError as e:
        wanted = "give --coordinator, --processes and --process"
        raise UserError(f"--distributed: no cluster was found here ({e}); {wanted}") from e
    except RuntimeError as e:  # JAX's service or client failed
        where = f"--coordinator={address}: " if address else ""
        raise MachineFault(f"{where}the processes cannot meet ({reason(e)})") from e
    timer.cancel()
    _backend()
    if jax.process_index() > 0:
        logging.getLogger("aoe_jax").setLevel(logging.WARNING)
    log.info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def _give_up():
    message = (
        f"error: not all processes joined within --join_timeout={_JOIN_TIMEOUT.value} s; start "
        "them all, with the same --coordinator and --processes"
    )
    print(message, file=sys.stderr, flush=True)
    os._exit(MachineFault.status)


def _digest(text):
    return zlib.crc32(text.encode()) % 2**31


def agree(what, text):
    """Waits for all processes, and raises `UserError` in all if `text` differs between them."""
    digests = gathered(_digest(text))
    differing = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise UserError(
            f"{what} of process {', '.join(differing)} differs from that of process 0; all "
            "processes must see the same --workdir and data, and get the same --config"
        )


def see_the_same(value, read, what):
    """Checks that `read()` returns the text `value` of process 0 in every process. If it does not
    within a minute, raises `UserError` with a message that begins with `what`.
    """
    if jax.process_count() == 1:
        return
    digest, deadline = gathered(_digest(value))[0], time.monotonic() + min(_JOIN_TIMEOUT.value, 60)
    with together():
        while not (seen := _digest(read()) == digest) and time.monotonic() < deadline:
            time.sleep(0.2)  # a network disk may show new files late
    blind = [str(process) for process, sees in enumerate(gathered(seen)) if not sees]
    if blind:
        raise UserError(
            f"{what}: process {', '.join(blind)} does not see what process 0 sees there; all "
            "processes must share that folder"
        )


@contextlib.contextmanager
def together():
    """A context that waits for all processes at its end; its body must not. If it fails in one, all
    raise: those with the highest exit status their own exception, all others `FailedElsewhere`.
    """
    problem = None
    try:
        yield
    except Exception as e:  # raised below, after the other processes have received its status
        problem = e
    statuses = gathered(status_of(problem) if problem else 0)
    worst = max(statuses)
    if worst and len(statuses) > 1:
        # Waits, because other processes may still read the statuses from process 0.
        time.sleep(_END_DELAY if jax.process_index() else 1.5 * _END_DELAY)
    if worst and statuses[jax.process_index()] == worst:
        raise problem
    if worst:
        failed = [process for process, status in enumerate(statuses) if status == worst]
        raise FailedElsewhere(failed, worst) from problem


def all_agree(holds):
    """Whether `holds` is true in every process; waits for all processes."""
    return all(gathered(bool(holds)))


def gathered(value):
    """Waits for all processes, and returns a list of the int `value` of each."""
    if jax.process_count() == 1:
        return [int(value)]
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()

"""Starts JAX, also on several processes: a TPU pod, a Slurm job, or processes named one by one."""

import contextlib
import errno
import hashlib
import ipaddress
import logging
import os
import re
import socket
import sys
import threading
import time

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from aoe_jax.config.checks import require_flag
from aoe_jax.errors import FailedElsewhere, MachineFault, UserError
from aoe_jax.storage.retry import is_fault, status_of

log = logging.getLogger(__name__)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of the processes of a TPU slice, Slurm, Open MPI or Kubernetes job"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for processes started one by one"
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "the number of processes, with --coordinator", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "the number of this process, from 0, with --coordinator", lower_bound=0
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)


_TWICE = b"twice"  # process 0's answer to a number that another process has or that is too large
_END_DELAY = 1.0  # seconds between the agreement to end and the end


def start():
    """Joins the other processes if the command line names any; call it before JAX is used. Raises
    `UserError` if the flags contradict each other or there is no cluster, and `MachineFault` if a
    process does not join or JAX finds no device.
    """
    flags_of_one = (_COORDINATOR, _PROCESSES, _PROCESS)
    given = [flag.name for flag in flags_of_one if flag.value is not None]
    missing = [flag.name for flag in flags_of_one if flag.value is None]
    if _DISTRIBUTED.value and given:
        raise UserError(
            f"--distributed and --{given[0]}: give one or the other; --distributed asks the cluster"
        )
    if given and missing:
        raise UserError(
            f"--{missing[0]} is missing; --coordinator, --processes and --process go together"
        )
    if given:
        _meet()
    if given or _DISTRIBUTED.value:
        _initialize()
    if _backend() == "cpu" and jax.device_count() > 1:
        # Programs from the cache have lost the order of their collectives, and deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
        if jax.config.jax_compilation_cache_dir:
            log.warning(
                "the compilation cache is off: its programs deadlock on several CPU devices"
            )


def _backend():
    try:
        return jax.default_backend()
    except (AssertionError, RuntimeError) as e:  # another process may be using the devices
        first_line = str(e).partition("\n")[0]
        why = first_line or "there is none, or JAX's plugin for it is missing"
        platforms = f"JAX_PLATFORMS={jax.config.jax_platforms or ''}"
        raise MachineFault(f"JAX finds no device ({platforms}): {why}") from e


def _initialize():
    timeout = _JOIN_TIMEOUT.value

    def give_up():  # earlier than JAX, which would abort
        message = f"error: not all processes joined within --join_timeout={timeout} s"
        print(message, file=sys.stderr, flush=True)
        os._exit(MachineFault.status)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        place = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
        named = _COORDINATOR.value and _interface()  # an IP address: JAX listens only there, too
        bind = _COORDINATOR.value if named else None
        jax.distributed.initialize(
            *place, initialization_timeout=timeout + 60, coordinator_bind_address=bind
        )
    except ValueError as e:
        raise UserError(
            f"--distributed: no cluster was found here ({e}); give --coordinator, --processes and "
            "--process"
        ) from e
    timer.cancel()
    _backend()
    if jax.process_index() > 0:
        logging.getLogger("aoe_jax").setLevel(logging.WARNING)
    log.info(f"{jax.process_count()} processes, {jax.device_count()} devices")


def _meet():
    """Waits until all processes have reported to process 0, on the port that JAX takes next,
    because JAX cannot name a missing one.
    """
    host, _, port = _COORDINATOR.value.rpartition(":")
    address = "must be HOST:PORT of process 0, such as 10.0.0.1:12345"
    require_flag(host and port.isdecimal(), "coordinator", _COORDINATOR.value, address)
    wanted = "IPv6 is not supported; name an IPv4 address or a host name"
    require_flag(":" not in host, "coordinator", _COORDINATOR.value, wanted)
    wanted = "the port must be from 1 to 65535"
    in_range = len(port) < 6 and 0 < int(port) < 2**16
    require_flag(in_range, "coordinator", _COORDINATOR.value, wanted)
    below = f"must be below --processes={_PROCESSES.value}; processes count from 0"
    require_flag(_PROCESS.value < _PROCESSES.value, "process", _PROCESS.value, below)
    deadline = time.monotonic() + _JOIN_TIMEOUT.value
    first = _PROCESS.value == 0
    missing = _gather(int(port), deadline) if first else _ask(host, int(port), deadline)
    if missing:
        what = f"process {missing} has" if missing.isdecimal() else f"processes {missing} have"
        raise MachineFault(
            f"{what} not joined within --join_timeout={_JOIN_TIMEOUT.value} s; start them all with "
            "the same --coordinator and --processes"
        )


def _interface():
    """The coordinator's IP address or localhost, or "" for all addresses if it is a host name."""
    host = _COORDINATOR.value.rpartition(":")[0]
    with contextlib.suppress(ValueError):
        return host if host == "localhost" else str(ipaddress.IPv4Address(host))
    return ""


def _gather(port, deadline):
    """In process 0: waits for the others, and tells each of them which are missing."""
    others, numbers = {}, range(1, _PROCESSES.value)
    try:
        server = socket.create_server((_interface(), port))
    except OSError as e:  # the program that uses the port now may end
        kind = MachineFault if e.errno == errno.EADDRINUSE else UserError
        raise kind(
            f"--coordinator={_COORDINATOR.value}: process 0 cannot listen there ({e.strerror}); "
            "name a free port"
        ) from e
    with server:
        while True:
            _drop_ended(others)
            if len(others) == len(numbers) or time.monotonic() >= deadline:
                break
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                number = _read_number(connection)
                _drop_ended(others)
                if number in others or number not in numbers:
                    with connection:
                        connection.sendall(_TWICE)
                else:
                    others[number] = connection
        missing = ", ".join(str(number) for number in numbers if number not in others)
        for connection in others.values():
            with connection:
                connection.sendall(missing.encode() or b"go")
    return missing


def _read_number(connection):
    connection.settimeout(5)
    with contextlib.suppress(ValueError, OSError):
        return int(connection.recv(16))
    return None


def _drop_ended(others):
    for number in [number for number, other in others.items() if _has_hung_up(other)]:
        others.pop(number).close()


def _has_hung_up(connection):
    connection.settimeout(0)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _ask(host, port, deadline):
    """In other processes: reports to process 0; returns the numbers of the missing processes."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1) as connection:
                connection.sendall(str(_PROCESS.value).encode())
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                answer = connection.recv(4096)
        except OSError:
            answer = None
        twice = "another process has this number, or process 0 has other --processes"
        require_flag(answer != _TWICE, "process", _PROCESS.value, twice)
        # Process 0 may end before it answers. While the processes of an earlier start end, JAX's
        # service may answer instead.
        if answer is None or not re.fullmatch(rb"go|[\d, ]+", answer):
            time.sleep(0.2)
            continue
        return answer.decode().removeprefix("go")
    raise MachineFault(
        f"process 0 at --coordinator={_COORDINATOR.value} cannot be reached within "
        f"--join_timeout={_JOIN_TIMEOUT.value} s"
    )


def agree(what, text):
    """Waits for all processes; raises `UserError` if they have different texts."""
    digests = gathered(int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big"))
    differing = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise UserError(
            f"{what} of process {', '.join(differing)} differs from that of process 0; all "
            "processes must see the same --workdir and data, and get the same --config"
        )


def see_the_same(value, read, what):
    """Checks that every process can read an int that process 0 sees; returns it in all.

    `value` is that int in process 0 and None in the others; `read()` reads it, or returns None.
    After a minute, or a shorter `--join_timeout`, it raises `MachineFault` if process 0 does not
    see it, else `UserError`. The message begins with `what`, the place.
    """
    if jax.process_count() == 1:
        return value
    value, seen = gathered(value or 0)[0], False
    deadline = time.monotonic() + min(_JOIN_TIMEOUT.value, 60)  # a network disk shows it late
    with together():  # one host alone may lack credentials for a store
        while not seen and time.monotonic() < deadline:
            try:
                seen = read() == value
            except Exception as e:  # a network disk or a store may fail for a while
                if not isinstance(e, OSError) and not is_fault(e):
                    raise
            time.sleep(0 if seen else 0.2)
    blind = [process for process, sees in enumerate(gathered(seen)) if not sees]
    if 0 in blind:
        raise MachineFault(f"{what}: what process 0 saw there is gone; is its disk mounted?")
    if blind:
        raise UserError(
            f"{what}: process {', '.join(map(str, blind))} does not see what process 0 sees "
            "there; all processes must share that folder"
        )
    return value


@contextlib.contextmanager
def together():
    """A context that waits for all processes, and fails in all if its body fails in one. The body
    may not wait for other processes. The processes with the highest exit status raise their own
    exception, the others raise `FailedElsewhere`.
    """
    problem = None
    try:
        yield
    except Exception as e:  # raised below, after the other processes know
        problem = e
    statuses = gathered(status_of(problem) if problem else 0)
    worst = max(statuses)
    if worst and len(statuses) > 1:
        # If one ends at once, the exchange may fail in another; process 0 has JAX's service.
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
    """The int of every process."""
    if jax.process_count() == 1:
        return [int(value)]
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()

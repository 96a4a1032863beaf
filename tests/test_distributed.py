"""How processes meet when some of them end meanwhile."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from aoe_jax import distributed
from aoe_jax.errors import MachineFault, UserError
from tests.processes import free_port
from tests.runs import finish, start, train_command


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    for name, value in (("COORDINATOR", f"localhost:{port}"), ("PROCESSES", 3), ("PROCESS", 1)):
        monkeypatch.setattr(distributed, f"_{name}", SimpleNamespace(value=value))
    return port


def ask(port, number):
    """Asks as a process of this number does."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.01)
            continue
        connection.sendall(str(number).encode())
        return connection
    raise TimeoutError


def test_a_process_that_waits_may_be_killed(port):
    """It is missed, and another of its number takes its place; a second living one is refused."""
    missing = []
    deadline = time.monotonic() + 30
    waiting = threading.Thread(
        target=lambda: missing.append(distributed._gather(port, deadline)), daemon=True
    )
    waiting.start()
    ask(port, 1).close()
    with ask(port, 2) as second:
        time.sleep(0.2)
        assert waiting.is_alive()
        for number in (2, 7):
            with ask(port, number) as refused:
                assert refused.recv(16) == b"twice"
        with ask(port, 1) as first:
            assert first.recv(16) == second.recv(16) == b"go"
    waiting.join()
    assert missing == [""]


def test_process_0_may_end_before_it_answers(port):
    """So may the service of JAX from before, which answers in its own way."""
    with socket.create_server(("localhost", port)) as server:

        def serve():
            for answer in (b"", b"\0\0\xfe", b"go"):
                connection, _ = server.accept()
                with connection:
                    connection.recv(16)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        assert distributed._ask("localhost", port, time.monotonic() + 30) == ""


def test_a_number_twice(port):
    with socket.create_server(("localhost", port)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.sendall(b"twice")

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="--process=1: another process has this number"):
            distributed._ask("localhost", port, time.monotonic() + 30)


@pytest.mark.parametrize(("platform", "why"), [("cuda", "there is none"), ("pigeon", "Unable to")])
def test_without_a_device(tmp_path, platform, why):
    command = train_command(tmp_path / "run")
    status, _, stderr = finish(start(command, forked=False, JAX_PLATFORMS=platform))
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: JAX finds no device (JAX_PLATFORMS={platform}): {why}")


def test_a_process_that_may_not_look_tells_the_others(monkeypatch):
    def refuse():
        raise UserError("log in to the object store on this machine")

    shared = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_JOIN_TIMEOUT", SimpleNamespace(value=300))
    monkeypatch.setattr(distributed, "gathered", lambda v: shared.append(int(v)) or [int(v), 0])
    with pytest.raises(UserError, match="log in"):
        distributed.see_the_same(7, refuse, "gs://bucket/run")
    assert shared == [7, UserError.status]

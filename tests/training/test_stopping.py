"""Signals to a training run, without processes."""

import os
import signal

import pytest

from aoe_jax.errors import Interrupted, Preempted
from aoe_jax.training import stopping
from aoe_jax.training.stopping import StopRequests


@pytest.fixture
def send(monkeypatch):
    """Calls the handler of a signal; an exit at once raises `SystemExit`."""
    handlers = {}

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(os, "_exit", leave)
    return lambda number: handlers[number](number, None)


@pytest.mark.parametrize(
    ("number", "kind", "status"),
    [(signal.SIGTERM, Preempted, 143), (signal.SIGINT, Interrupted, 130)],
)
def test_the_first_signal_asks_and_the_second_ends_at_once(send, number, kind, status):
    stop = StopRequests()
    stop.listen()
    assert not stop.asked()
    send(number)
    assert stop.asked() and stop.asked()
    assert isinstance(stop.end("saved"), kind) and str(stop.end("saved")).endswith(": saved")
    with pytest.raises(SystemExit) as ended:
        send(number)
    assert ended.value.code == status


def test_several_processes_stop_at_the_same_step(send, monkeypatch):
    """JAX takes the signal, and says at which question all of them stop."""
    sent, reached = [], "reached_preemption_sync_point"
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(stopping.multihost_utils, reached, lambda question: question == 3)
    first, other = StopRequests(), StopRequests()
    first.listen()
    send(signal.SIGINT)
    for stop, kind in ((first, Interrupted), (other, Preempted)):
        assert [stop.asked() for _ in range(3)] == [False, False, True]
        assert isinstance(stop.end("saved"), kind)
    assert sent == [signal.SIGTERM]

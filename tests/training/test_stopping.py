"""Stops of several imitated processes. `tests/test_promises.py` sends signals to real processes."""

import os
import signal

import pytest

from aoe_jax.errors import Interrupted, Preempted
from aoe_jax.training import stopping
from aoe_jax.training.stopping import StopRequests


def test_several_processes_stop_at_the_same_step(monkeypatch):
    """JAX receives the signal, and tells all processes at which question they stop."""
    handlers, sent, reached = {}, [], "reached_preemption_sync_point"
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(stopping.multihost_utils, reached, lambda question: question == 3)
    first, other = StopRequests(), StopRequests()
    first.listen()
    handlers[signal.SIGINT](signal.SIGINT, None)
    for stop, kind in ((first, Interrupted), (other, Preempted)):
        assert [stop.asked() for _ in range(3)] == [False, False, True]
        assert isinstance(stop.end("saved"), kind)
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("before", "numbers"),
    [
        (signal.SIG_DFL, {signal.SIGTERM: Preempted, signal.SIGHUP: Preempted}),
        (signal.SIG_IGN, {signal.SIGTERM: Preempted}),
    ],
    ids=["terminal", "nohup"],
)
def test_signals(monkeypatch, before, numbers):
    """Shells start background jobs with SIGINT ignored; it stops them nevertheless. A scheduler's
    SIGTERM can come twice: to the whole group, and again from a parent.
    """
    handlers, exits = {}, []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(signal, "getsignal", lambda number: before)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for number, kind in (numbers | {signal.SIGINT: Interrupted}).items():
        stop = StopRequests()
        stop.listen()
        assert handlers.keys() == numbers.keys() | {signal.SIGINT} and not stop.asked()
        handlers[number](number, None)
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert stop.asked() and type(stop.end("saved")) is kind and not exits
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert exits == [Interrupted.status]

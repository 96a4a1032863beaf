"""Tests how several processes connect, agree on values, and fail together."""

from types import SimpleNamespace
from unittest import mock

import pytest

from aoe_jax import distributed
from aoe_jax.errors import FailedElsewhere, MachineFault, UserError
from tests.processes import free_port
from tests.runs import finish, start, train_command


@pytest.mark.parametrize(("platform", "why"), [("cuda", "there is none"), ("pigeon", "Unable to")])
def test_without_a_device(tmp_path, platform, why):
    command = train_command(tmp_path / "run")
    status, _, stderr = finish(start(command, forked=False, JAX_PLATFORMS=platform))
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: JAX finds no device (JAX_PLATFORMS={platform}): {why}")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(0, 2), (1,)], ids=["one is missing", "nobody is there"])
def test_a_process_that_never_joins(tmp_path, numbers):
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=3", "--join_timeout=4"]
    command = [*train_command(tmp_path / "run"), *flags]
    for process in [start([*command, f"--process={number}"]) for number in numbers]:
        status, _, stderr = finish(process)
        last = "error: not all processes joined within --join_timeout=4 s; start them all, with"
        assert status == 5 and stderr.splitlines()[-1].startswith(last), stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("host", ["localhost", "10.0.0.1", "tpu-3"])
def test_joining(monkeypatch, host):
    """The timer ends with the wait. Given an IP address, process 0 listens only at that address."""
    timer, initialize, address = mock.Mock(), mock.Mock(), f"{host}:9"
    monkeypatch.setattr(distributed.threading, "Timer", timer)
    monkeypatch.setattr("jax.distributed.initialize", initialize)
    given = {"_COORDINATOR": address, "_PROCESSES": 2, "_PROCESS": 0, "_JOIN_TIMEOUT": 7}
    for name, value in given.items():
        monkeypatch.setattr(distributed, name, SimpleNamespace(value=value))
    distributed._initialize()
    timer.assert_called_once_with(7, distributed._give_up)
    timer.return_value.cancel.assert_called_once_with()
    settings = initialize.call_args.kwargs
    assert settings["coordinator_bind_address"] == (None if host == "tpu-3" else address)
    assert settings["initialization_timeout"] > 7  # the timer, whose message is clear, is first


@pytest.fixture
def two(monkeypatch):
    """Imitates process 0 of two. The list has the next values of process 1, None for equal ones."""
    says = []

    def gathered(value):
        other = says.pop(0) if says else None
        return [int(value), int(value) if other is None else other]

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gathered", gathered)
    monkeypatch.setattr(distributed, "_END_DELAY", 0.0)
    monkeypatch.setattr(distributed, "_JOIN_TIMEOUT", SimpleNamespace(value=60))
    return says


def test_all_fail_together(two):
    with distributed.together():
        pass
    for other, kind in ((2, UserError), (0, UserError), (5, FailedElsewhere)):
        two[:] = [other]
        with pytest.raises(kind) as caught, distributed.together():
            raise UserError("log in to the object store on this machine")
        assert caught.value.status == max(other, UserError.status)
    two[:] = [5]
    with pytest.raises(FailedElsewhere, match="process 1 failed"), distributed.together():
        pass


def test_what_all_must_see(two, monkeypatch):
    distributed.see_the_same("a", lambda: "a", "gs://bucket/run")
    two[:] = [None, None, 0]
    with pytest.raises(UserError, match="gs://bucket/run: process 1 does not see what process 0"):
        distributed.see_the_same("a", lambda: "a", "gs://bucket/run")
    reads = iter(["", "b", "a"])
    distributed.see_the_same("a", lambda: next(reads), "/shared/run")
    assert next(reads, None) is None


def test_what_must_be_equal(two):
    distributed.agree("the configuration", "x")
    two[:] = [1]
    with pytest.raises(UserError, match="the configuration of process 1 differs from that of pro"):
        distributed.agree("the configuration", "x")

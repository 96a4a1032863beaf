"""Copies of the state on the disk of a host."""

import dataclasses
import errno
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aoe_jax.errors import UserError
from aoe_jax.training import local_copies
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.local_copies import LocalCopies
from aoe_jax.training.step import TrainState
from tests.runs import dense_command, dense_run, disk, finish, same_end, start, tiny_config
from tests.training.test_checkpoint import ABSTRACT, flip_bit, state_of

DATA = {"position": 4}


def copies(tmp_path, history=1, data=("speeches",), nonce=5, path="local", **changes):
    settings = {"checkpoint__every": 10, "checkpoint__local_every": 3}
    settings |= {"checkpoint__local_path": str(tmp_path / path)}
    (tmp_path / path).mkdir(exist_ok=True)
    config = tiny_config(**settings | changes)
    return LocalCopies(tmp_path / "run", config, history, data, nonce)


def save(local, *steps, sync=lambda: None):
    for step in steps:
        state = state_of(step)
        local.save(step, state, DATA, Progress(loss=float(step)), sync)
        jax.tree.map(lambda a: a.delete(), state)
    local.wait()
    return local


def files(tmp_path):
    return sorted(path.name.partition("-")[0] for path in (tmp_path / "local").rglob("*.*"))


def equal(state, step):
    jax.tree.map(np.testing.assert_array_equal, vars(state), vars(state_of(step)))
    return True


def test_the_newest_copies_are_kept_and_read_back(tmp_path):
    assert save(copies(tmp_path), 2, 4, 6, 8).saved == 8
    local = copies(tmp_path)
    assert files(tmp_path) == ["4", "6", "8"] and local.newest() == 8 and local.saved == 0
    state, progress, position = local.restore(8, ABSTRACT)
    assert equal(state, 8) and progress == Progress(loss=8.0) and position == DATA
    assert local.saved == 8


def test_pieces_of_sharded_arrays(tmp_path):
    """Each distinct piece is saved once, also where devices have two pieces in other replicas."""
    mesh = jax.make_mesh((2, 3), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = {"kernel": P("fsdp"), "scale": P("fsdp"), "selection_bias": P(), "mu": P("data")}
    values = {
        "kernel": np.arange(24, dtype=np.float32).reshape(6, 4),
        "scale": np.arange(6).astype(jnp.bfloat16),
        "selection_bias": np.float32(3),
        "mu": np.arange(8, dtype=np.int32).reshape(2, 4),
    }
    arrays = {
        name: jax.device_put(value, NamedSharding(mesh, shardings[name]))
        for name, value in values.items()
    }
    params = {name: arrays[name] for name in ("kernel", "scale")}
    step = jax.device_put(jnp.int32(1), NamedSharding(mesh, P()))
    state = TrainState(step, step, params, {"b": arrays["selection_bias"]}, {"m": arrays["mu"]})
    local = copies(tmp_path)
    local.save(3, state, DATA, Progress(), lambda: None)
    local.wait()
    (file,) = (tmp_path / "local").rglob("*.npz")
    with np.load(file) as saved:
        assert len(saved.files) == 1 + 3 + 3 + 1 + 2 + 2
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    found = copies(tmp_path).restore(3, like)[0]
    jax.tree.map(np.testing.assert_array_equal, vars(found), vars(state))
    assert found.params["kernel"].sharding == arrays["kernel"].sharding


@pytest.mark.parametrize(
    "other", [{"history": 2}, {"data": ()}, {"train__steps": 30}], ids=["history", "data", "steps"]
)
def test_copies_of_another_run_do_not_count(tmp_path, other):
    save(copies(tmp_path), 3)
    assert copies(tmp_path).newest() == 3
    assert copies(tmp_path, **other).newest() == 0
    copies(tmp_path, **other).begin(0)
    assert files(tmp_path) == []


def test_other_copies_are_deleted_when_a_run_goes_on(tmp_path):
    save(copies(tmp_path), 3, 6)
    local = copies(tmp_path)
    local.begin(3)  # as if another process had lost the newest
    assert files(tmp_path) == ["3"]
    save(local, 6)
    assert files(tmp_path) == ["3", "6"]
    local.delete()
    assert not any((tmp_path / "local").iterdir())


@pytest.mark.parametrize("damage", ["bit", "cut", "text", "gone", "piece"])
def test_a_damaged_copy_is_not_used(tmp_path, damage, caplog):
    save(copies(tmp_path), 3)
    (file,) = (tmp_path / "local").rglob("*.npz")
    content, wanted = file.read_bytes(), ABSTRACT
    if damage == "bit":
        flip_bit(file, len(content) // 2)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "text":
        file.write_text("{}")
    elif damage == "gone":
        file.unlink()
    else:
        wanted = dataclasses.replace(ABSTRACT, params=ABSTRACT.params | {"more": ABSTRACT.step})
    assert copies(tmp_path).restore(3, wanted) is None
    assert "cannot be read" in caplog.text


def test_copies_of_two_starts_do_not_mix(tmp_path, monkeypatch):
    save(copies(tmp_path), 3)
    local = copies(tmp_path)
    monkeypatch.setattr(local_copies, "gathered", lambda nonce: [nonce, 7])
    assert local.restore(3, ABSTRACT) is None


def test_a_disk_that_fails_ends_no_run(tmp_path, caplog):
    """Later copies are written again once there is room."""
    with disk(tmp_path / "small", "1m"):
        local = save(copies(tmp_path, path="small"), 3, 6)
        assert local.newest() == local.saved == 3
        assert not [*(tmp_path / "small").rglob("*.partial")]
        assert caplog.text.count("No space left on device); the run goes on") == 1
        local.begin(0)
        assert save(local, 9).newest() == 9 and equal(local.restore(9, ABSTRACT)[0], 9)
    caplog.clear()
    (tmp_path / "small").rmdir()
    save(local, 12)  # the disk is not mounted
    assert "cannot be written" in caplog.text and not (tmp_path / "small").exists()


def test_a_copy_is_not_ahead_of_the_metrics(tmp_path, caplog):
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    local = save(copies(tmp_path), 3, sync=fail)
    assert local.newest() == 0 and "cannot be written (Input/output error)" in caplog.text


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="local_every=10: must be below checkpoint.every=10"):
        copies(tmp_path, checkpoint__local_every=10)
    with pytest.raises(UserError, match="local_path=gs://b/c: it must be on a disk"):
        tiny_config(checkpoint__local_path="gs://b/c")
    path = tiny_config(checkpoint__local_path="x", checkpoint__local_every=2).checkpoint.local_path
    assert path.startswith("/")


def step_of(path):
    return int(path.name.partition("-")[0])


@pytest.mark.parametrize("case", ["whole", "damaged", "goes back"])
def test_a_killed_run_goes_on_from_its_copies(tmp_path, case):
    """It ends bit for bit as one without a stop, also without its copies; a run that goes back does
    not use them.
    """
    workdir, local = tmp_path / "run", tmp_path / "local"
    local.mkdir()
    settings = {"checkpoint__every": 8, "checkpoint__local_every": 2}
    settings |= {"checkpoint__local_path": str(local), "checkpoint__keep_every": 8}
    process, checkpoints = start(dense_command(workdir, **settings)), Checkpoints(workdir)
    deadline = time.monotonic() + 120
    # The checkpoint of step 8 is written in the background, beside the copies of later steps.
    while not checkpoints.steps() or not any(step_of(path) > 8 for path in local.rglob("*.npz")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    saved = max(checkpoints.steps())
    copied = max(step_of(path) for path in local.rglob("*.npz"))
    words, flags = f"going on from step {saved}\n", []
    if case == "goes back":
        words, flags = "going on from step 8\n", ["--go-back=8"]
    elif case == "damaged":
        for path in local.rglob("*.npz"):
            path.write_bytes(b"damaged")
    elif copied > saved:
        words = f"going on from the local copies of step {copied}\n"
    status, _, stderr = finish(start([*dense_command(workdir, **settings), *flags]))
    assert status == 0 and words in stderr, stderr
    assert ("cannot be used; back to" in stderr) == (case == "damaged" and copied > saved)
    assert same_end(workdir, dense_run()) and files(tmp_path) == []

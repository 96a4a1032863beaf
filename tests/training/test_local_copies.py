"""Copies of the state on the disk of a host."""

import signal
import time

import jax
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.checkpoint_content import Damaged
from aoe_jax.training.local_copies import LocalCopies
from tests.runs import disk, finish, finished_run, same_end, start, tiny_config, train_command
from tests.training.test_checkpoint import ABSTRACT, files_of, flip_bit, state_of

BEGAN = 1_700_000_000.5
DATA = {"position": 4}


def copies(tmp_path, began=BEGAN, anew=False, path="local", **changes):
    config = tiny_config(
        checkpoint__local_path=str(tmp_path / path), checkpoint__every=10, **changes
    )
    return LocalCopies(tmp_path / "run", config, began, anew)


def with_copies(tmp_path, steps, went_on_from=0, **options):
    """Copies of these steps, of a run that went on from another."""
    local = copies(tmp_path, checkpoint__local_every=3, **options)
    local.open(BEGAN, went_on_from)
    for step in steps:
        local.wait()
        local.save(step, state_of(step), DATA, Progress(loss=float(step)))
    local.wait()
    return local


def test_the_newest_copies_are_kept_and_read_back(tmp_path):
    with_copies(tmp_path, [3, 6, 9])
    local = copies(tmp_path, checkpoint__local_every=3)
    assert sorted(path.name for path in local.directory.iterdir()) == ["6", "9"]
    assert local.newest() == 9
    state, progress, position = local.restore(9, ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, vars(state), vars(state_of(9)))
    assert progress == Progress(loss=9.0) and position == DATA


@pytest.mark.parametrize(
    "other",
    [{"began": BEGAN + 1}, {"began": None}, {"train__steps": 30}, {"anew": True}],
    ids=["run", "new run", "steps", "anew"],
)
def test_copies_of_another_run_do_not_count(tmp_path, other):
    with_copies(tmp_path, [3])
    assert copies(tmp_path, **{"checkpoint__local_every": 3} | other).newest() == 0
    assert copies(tmp_path, checkpoint__local_every=3).newest() == (0 if "anew" in other else 3)


def test_older_copies_are_deleted_when_a_run_goes_on(tmp_path):
    with_copies(tmp_path, [3, 6])
    local = with_copies(tmp_path, [], went_on_from=6)
    assert [path.name for path in local.directory.iterdir()] == ["6"]
    local = with_copies(tmp_path, [6], went_on_from=0)  # it went back to another step
    np.testing.assert_array_equal(local.restore(6, ABSTRACT)[0].step, 6)
    local.delete()
    assert not any((tmp_path / "local").rglob("process_0"))


def test_a_damaged_copy_is_noticed(tmp_path):
    local = with_copies(tmp_path, [3])
    largest = max(files_of(local.directory / "3" / "state"), key=lambda path: path.stat().st_size)
    flip_bit(largest, largest.stat().st_size // 2)
    with pytest.raises(Damaged):
        local.restore(3, ABSTRACT)


def test_a_full_disk_ends_no_run(tmp_path, caplog):
    with disk(tmp_path / "small", "100k"):
        local = with_copies(tmp_path, [3, 6, 9], path="small")
        assert [path.name for path in local.directory.iterdir()] == ["3"] == [str(local.newest())]
        local.restore(3, ABSTRACT)
    assert caplog.text.count("a local copy in") == 1 and "the run goes on" in caplog.text


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="local_every=50: must be below checkpoint.every=10"):
        copies(tmp_path)
    with pytest.raises(UserError, match="local_path=gs://b/c: it must be on a disk"):
        tiny_config(checkpoint__local_path="gs://b/c")
    path = tiny_config(checkpoint__local_path="x", checkpoint__local_every=2).checkpoint.local_path
    assert path.startswith("/")


def killed_after_a_copy(workdir, local, settings):
    process = start(train_command(workdir, **settings))
    deadline = time.monotonic() + 120
    while not any(path.name.isdecimal() for path in local.glob("*/process_0/*/*")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL


def test_a_killed_run_goes_on_from_its_copies(tmp_path):
    """It ends bit for bit as one without a stop, also if the copies are lost."""
    workdir, local = tmp_path / "run", tmp_path / "local"
    settings = {"checkpoint__every": 100, "checkpoint__local_every": 2}
    settings |= {"checkpoint__local_path": str(local)}
    killed_after_a_copy(workdir, local, settings)
    step = max(int(path.name) for path in local.glob("*/process_0/*/*") if path.name.isdecimal())
    status, _, stderr = finish(start(train_command(workdir, **settings)))
    assert status == 0 and f"going on from the local copies of step {step}" in stderr, stderr
    assert same_end(workdir, finished_run())
    assert not any(local.rglob("process_0"))

"""Checkpoints of a small state."""

import dataclasses
import errno
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
import tracemalloc

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aoe_jax.config.training import CheckpointConfig
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.fingerprints import check_repetition, fingerprints, local_fingerprints
from aoe_jax.training.step import TrainState
from aoe_jax.training.writers import JsonLines
from tests.runs import contents, disk

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
SIZE = 200_000  # large enough to be still in writing when the next step begins


def batches():
    return iter(grain.MapDataset.range(1000).shuffle(0).batch(4).to_iter_dataset())


def state_of(value, biased=True):
    params = {
        "kernel": jnp.full((SIZE,), value, jnp.float32),
        "scale": jnp.full((3,), value, jnp.bfloat16),
    }
    bias = {"selection_bias": jnp.full((2, 4), value, jnp.float32)} if biased else {}
    moments = {"mu": jnp.full((5,), value, jnp.float32)}
    return jax.device_put(
        TrainState(jnp.int32(value), jnp.int32(0), params, bias, moments), SHARDING
    )


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SHARDING), state)


ABSTRACT = abstract(state_of(0))


def step_folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def write(workdir, config, steps, nll=lambda step: None):
    """Saves steps in the way of training."""
    checkpoints = Checkpoints(workdir, config)
    for step in steps:
        if nll(step) is not None:
            with open(workdir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "validation_nll": nll(step)}) + "\n")
            checkpoints.validated(step, nll(step))
        checkpoints.save(step, state_of(step), {"next_index": step}, Progress(1.0, 2.0, True))
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Five steps, each donating its state to the next while it is saved; and the batch that follows
    each step.
    """
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=2, keep=3))
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state, data, following = state_of(0), batches(), {}
    batch = next(data)
    for number in range(1, 6):
        state = step(state)
        checkpoints.save(
            number,
            state,
            data.get_state(),
            Progress(number, number / 3, number % 2 == 0, 7 - number),
        )
        following[number] = batch = next(data)
    checkpoints.close()
    assert batch.shape == (4,)
    return workdir, following


def copy_of(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


def without_newer(workdir, step):
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return workdir


@pytest.mark.parametrize("number", [3, 4, 5])
def test_state_may_be_donated_while_it_is_saved(saved, tmp_path, number):
    """Position and progress are restored with it."""
    workdir, data = without_newer(copy_of(saved, tmp_path), number), batches()
    step, state, progress = Checkpoints(workdir).restore_newest(ABSTRACT, data)
    assert (step, progress) == (number, Progress(number, number / 3, number % 2 == 0, 7 - number))
    wanted = dataclasses.replace(state_of(0), skipped=jnp.int32(number))
    for array, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert array.dtype == like.dtype and array.sharding == SHARDING
        np.testing.assert_array_equal(array, number)
    np.testing.assert_array_equal(next(data), saved[1][number])
    assert not np.array_equal(saved[1][3], saved[1][5])


def test_what_evaluation_needs(saved):
    params, routing_state = Checkpoints(saved[0]).restore_model(4, ABSTRACT)
    assert params.keys() == {"kernel", "scale"}
    np.testing.assert_array_equal(params["kernel"], 4)
    np.testing.assert_array_equal(routing_state["selection_bias"], np.full((2, 4), 4))


def test_state_without_a_selection_bias(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state_of(1, biased=False), {"next_index": 0}, Progress(1, 1, True))
    checkpoints.close()
    wanted = abstract(state_of(0, biased=False))
    params, routing_state = Checkpoints(tmp_path).restore_model(1, wanted)
    np.testing.assert_array_equal(params["kernel"], 1)
    assert routing_state == {}
    assert Checkpoints(tmp_path).restore_newest(wanted, batches())[1].routing_state == {}


NLL = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 6.0, 7: 7.0}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(every=1, keep=2), "67"),
        (CheckpointConfig(every=1, keep=1, keep_every=3), "367"),
        (CheckpointConfig(every=1, keep=1, keep_best=2), "247"),
        (CheckpointConfig(every=1, keep=2, keep_every=5, keep_best=1), "2567"),
    ],
)
def test_what_is_kept(tmp_path, config, kept):
    write(tmp_path, config, NLL, NLL.get)
    assert step_folders(tmp_path) == list(kept)


def test_model_whose_validation_is_not_finite_is_never_the_best(tmp_path):
    nlls = {1: 5.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: math.inf}
    write(tmp_path, CheckpointConfig(every=1, keep=1, keep_best=1), nlls, nlls.get)
    assert step_folders(tmp_path) == ["2", "5"]
    assert Checkpoints(tmp_path).find("best") == 2


def test_validation_that_is_made_up_for_counts(tmp_path):
    """A checkpoint may be older than its validation, if the run was stopped between the two."""
    config = CheckpointConfig(every=1, keep=1, keep_best=1)
    write(tmp_path, config, [1, 2], {1: 5.0}.get)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.validated(2, 3.0)
    checkpoints.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 2, "nll": 9.0}\n{"step": 2, "validation_nll": 3.0}\n{"step": 3, "valid'
        )
    write(tmp_path, config, [3], {3: 4.0}.get)
    assert step_folders(tmp_path) == ["2", "3"]


def test_what_is_kept_is_kept_by_the_next_start_too(tmp_path):
    config = CheckpointConfig(every=1, keep=1, keep_best=1)
    write(tmp_path, config, [1, 2, 3], NLL.get)
    write(tmp_path, config, [4, 5], NLL.get)
    assert step_folders(tmp_path) == ["2", "5"]


def test_checkpoints_by_the_word_of_a_user(tmp_path):
    checkpoints = Checkpoints(write(tmp_path, CheckpointConfig(keep=9), [1, 2, 3], NLL.get))
    assert [checkpoints.find(word) for word in ("newest", "best", "1")] == [3, 2, 1]
    for word in ("4", "last", "-1", "٣", "9" * 5000):
        with pytest.raises(
            UserError,
            match=f"--step={word}: .*has checkpoints of steps 1, 2, 3; or give newest, best",
        ):
            checkpoints.find(word)
    unscored = Checkpoints(write(tmp_path / "unscored", CheckpointConfig(), [1]))
    with pytest.raises(UserError, match=r"--step=best: no checkpoint of .* has a validation nll"):
        unscored.find("best")
    with pytest.raises(UserError, match="has no complete checkpoint; train first"):
        Checkpoints(tmp_path / "none").find("newest")


def test_no_checkpoint_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == []
    checkpoints.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("half", ["6.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700000000"])
def test_half_written_checkpoint_is_ignored_and_cleared_away(saved, tmp_path, half):
    workdir = copy_of(saved, tmp_path)
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / half)
    shutil.rmtree(workdir / "checkpoints" / half / "state")
    assert Checkpoints(workdir).steps()[-1] == 5
    write(workdir, CheckpointConfig(every=1, keep=3), [6])
    assert step_folders(workdir) == ["4", "5", "6"]


def test_half_a_save_may_vanish_while_it_is_deleted(tmp_path):
    """Threads of a save that has failed delete files of theirs."""
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    files = [half / f"{i}" for i in range(5000)]
    for path in files:
        path.touch()
    other = threading.Thread(target=lambda: [path.unlink(missing_ok=True) for path in files])
    other.start()
    write(tmp_path, CheckpointConfig(), [6])
    other.join()
    assert step_folders(tmp_path) == ["6"]


def test_half_deleted_old_checkpoint_does_no_harm(saved, tmp_path):
    """A kill during the removal of an old checkpoint leaves this."""
    workdir = copy_of(saved, tmp_path)
    (workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(workdir / "checkpoints" / "3" / "run")
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 5
    write(workdir, CheckpointConfig(every=1, keep=2), [6])
    assert step_folders(workdir) == ["5", "6"]


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "flipped": lambda path: flip_bit(path, path.stat().st_size // 2),
    "flipped near the end": lambda path: flip_bit(path, path.stat().st_size - 9),
}


@pytest.fixture
def failing_reads():
    """Collects the reads that Orbax leaves unfinished after a failed one, whose complaints would
    otherwise appear in a later test.
    """
    yield
    gc.collect()


def unread(test):
    """Marks a test with failing reads; the command line hides the complaints too."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("failing_reads")(test)


@unread
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_set_aside(saved, tmp_path, damage, caplog):
    """Whichever file is damaged, the restored state is one that was saved, in this checkpoint or in
    the one before.
    """
    names = [path.relative_to(saved[0]) for path in files_of(saved[0] / "checkpoints" / "5")]
    assert len(names) > 5
    aside = 0
    for n, name in enumerate(names):
        workdir = shutil.copytree(saved[0], tmp_path / str(n))
        DAMAGE[damage](workdir / name)
        damaged = contents(workdir / "checkpoints" / "5")
        caplog.clear()
        step, state, progress = Checkpoints(workdir).restore_newest(ABSTRACT, batches())
        assert step == progress.loss == state.step, name
        for array in jax.tree.leaves((state.params, state.routing_state, state.opt_state)):
            np.testing.assert_array_equal(array, step)
        if step == 4:
            aside += 1
            assert "checkpoint of step 5 is damaged" in caplog.text, name
            assert contents(workdir / "damaged_checkpoints" / "5") == damaged
            assert step_folders(workdir) == ["3", "4"]
        else:
            assert step == 5 and not (workdir / "damaged_checkpoints").exists()
    assert aside >= 3  # of some files, such as the names of processes, nothing is needed


def signed(run):
    """The content of `run/metadata` with its right hash, as somebody else can make it."""
    return json.dumps(
        run | {"sha256": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()}
    )


FOREIGN = {
    "arrays of another kind": lambda run: run | {"arrays": {"params": 7}},
    "no arrays": lambda run: run | {"arrays": []},
    "progress of another kind": lambda run: run | {"progress": {"loss": "low"}},
    "no progress": lambda run: {"data": run["data"], "arrays": run["arrays"]},
    "no position": lambda run: run | {"data": None},
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_what_somebody_else_wrote_beside_the_state_is_damage(saved, tmp_path, change):
    workdir = copy_of(saved, tmp_path)
    file = workdir / "checkpoints" / "5" / "run" / "metadata"
    run = json.loads(file.read_text())
    file.write_text(signed(change({name: run[name] for name in ("data", "progress", "arrays")})))
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 4
    assert (workdir / "damaged_checkpoints" / "5").is_dir()


ANY_FILE = {
    "null": lambda text: "null",
    "a list": lambda text: "[]",
    "no tree": lambda text: '{"tree_metadata": 7, "array_metadatas": 7}',
    "a tree of another kind": lambda text: '{"tree_metadata": {"a": 7}, "array_metadatas": [null]}',
    "half": lambda text: text[: len(text) // 2],
}
FOREIGN_OF_ORBAX = {
    "_METADATA": ANY_FILE
    | {
        "another name of a parameter": lambda text: text.replace("params", "qarams"),
        "no kind of value": lambda text: text.replace('"value_metadata"', '"value"'),
    },
    "array_metadatas/process_0": ANY_FILE
    | {"no shape": lambda text: re.sub(r'"write_shape": \[[^]]*\]', '"write_shape": null', text)},
}


@unread
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in FOREIGN_OF_ORBAX.items() for case in cases]
)
def test_what_somebody_else_wrote_for_orbax_is_damage(saved, tmp_path, name, case):
    workdir = copy_of(saved, tmp_path)
    file = workdir / "checkpoints" / "5" / "state" / name
    file.write_text(FOREIGN_OF_ORBAX[name][case](file.read_text()))
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 4
    assert (workdir / "damaged_checkpoints" / "5").is_dir()


def test_other_files_beside_those_of_orbax_do_no_harm(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    (workdir / "checkpoints" / "5" / "state" / "array_metadatas" / ".nfs01").write_text("")
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 5


@unread
@pytest.mark.parametrize("name", ["run/metadata", "state/_METADATA", "state/manifest.ocdbt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path)])
def test_files_that_never_end_are_damage(saved, tmp_path, name, make):
    workdir = copy_of(saved, tmp_path)
    file = workdir / "checkpoints" / "5" / name
    file.unlink()
    make(file)
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 4


def test_folders_that_are_no_checkpoints(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    for name in ("007", "\N{ARABIC-INDIC DIGIT NINE}", "9" * 30, "5_copy", "lost+found"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "8").touch()
    assert Checkpoints(workdir).steps() == [3, 4, 5]
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").touch()
    with pytest.raises(UserError, match="/checkpoints is a file; move it away"):
        Checkpoints(workdir).steps()


def noise(step):
    """A state of random numbers, which do not compress: 0.8 MB a checkpoint."""
    kernel = jax.random.uniform(jax.random.key(step), (SIZE,))
    return dataclasses.replace(
        state_of(step), params={"kernel": kernel, "scale": jnp.ones(3, jnp.bfloat16)}
    )


@unread
def test_every_flipped_bit_of_the_arrays_is_seen(tmp_path):
    """Also bits whose change leaves a readable file."""
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig(every=1, keep=2))
    for step in (1, 2):
        checkpoints.save(step, noise(step), {"next_index": step}, Progress(1, 1, True))
    checkpoints.close()
    seen = 0
    (data,) = (
        path
        for path in files_of(tmp_path / "run" / "checkpoints" / "2")
        if path.stat().st_size > SIZE
    )
    for position in range(0, data.stat().st_size, data.stat().st_size // 16):
        workdir = shutil.copytree(tmp_path / "run", tmp_path / str(position))
        flip_bit(workdir / data.relative_to(tmp_path / "run"), position)
        step, state, _ = Checkpoints(workdir).restore_newest(ABSTRACT, batches())
        np.testing.assert_array_equal(state.params["kernel"], noise(step).params["kernel"])
        seen += step == 1
    assert seen > 12  # the rest of the file holds nothing


FAULTS = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EIO, "Input/output error"),
    OSError("Forbidden: https://storage.googleapis.com/b/x\nno"),  # of gcsfs
    MemoryError(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_fault_of_the_machine_is_no_damage(saved, tmp_path, monkeypatch, fault):
    """Nothing is set aside: with more memory or another disk, the newest checkpoint is readable."""
    words = r"checkpoints/5 cannot be read \(.*\); it was tried for 1 s"
    check_unreadable(saved, tmp_path, monkeypatch, fault, MachineFault, words)


def test_device_that_is_full_is_no_damage(saved, tmp_path, monkeypatch):
    """It is not tried again."""
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")
    check_unreadable(saved, tmp_path, monkeypatch, full, ValueError, "cannot read")


def check_unreadable(saved, tmp_path, monkeypatch, fault, kind, words):
    workdir = copy_of(saved, tmp_path)
    before = contents(workdir)

    def fail(*_, **__):
        raise ValueError("cannot read") from fault

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
        patch.setattr(retry, "retry_seconds", 1)
        with pytest.raises(kind, match=words):
            Checkpoints(workdir).restore_newest(ABSTRACT, batches())
    assert contents(workdir) == before
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 5


def test_checkpoints_on_another_disk(saved, tmp_path, monkeypatch):
    """A damaged one is moved to the disk of the workdir; a disk that is not mounted is a fault."""
    workdir = copy_of(saved, tmp_path)
    with disk(tmp_path / "disk", "9m") as other:
        shutil.move(workdir / "checkpoints", other / "mine")
        (workdir / "checkpoints").symlink_to(other / "mine")
        (other / "mine" / "5" / "run" / "metadata").write_text("{")
        damaged = contents(other / "mine" / "5")
        assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 4
        assert contents(workdir / "damaged_checkpoints" / "5") == damaged
        assert Checkpoints(workdir).steps() == [3, 4]
        gc.collect()  # else a file may still be open
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    with pytest.raises(MachineFault, match=r"a link to nothing; is its disk mounted\?"):
        Checkpoints(workdir).steps()


def test_the_disk_of_the_checkpoints_is_away_during_a_save(tmp_path, monkeypatch):
    """It comes back, and a later time it does not."""
    disk_of_run, away = tmp_path / "disk", tmp_path / "away"
    (disk_of_run / "mine").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(disk_of_run / "mine")
    checkpoints, waits = Checkpoints(tmp_path, CheckpointConfig(every=1)), []

    def until_it_is_back():
        waits.append("of the save, then of the look at it")
        if len(waits) == 2:
            away.rename(disk_of_run)
        yield from itertools.repeat(0.0)

    disk_of_run.rename(away)
    with monkeypatch.context() as patch:
        patch.setattr(retry, "pauses", until_it_is_back)
        checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1, True), wait=True)
    assert checkpoints.saved == 1 and Checkpoints(tmp_path).steps() == [1]
    disk_of_run.rename(away)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    with pytest.raises(MachineFault, match=r"a link to nothing; is its disk mounted\?"):
        checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1, True), wait=True)


@unread
def test_damaged_several_times(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    for step in ("5", "4"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 3
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "5")
    (workdir / "checkpoints" / "5" / "run" / "metadata").write_text("{")
    assert Checkpoints(workdir).restore_newest(ABSTRACT, batches())[0] == 3
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == [
        "4",
        "5",
        "5-1",
    ]


def test_a_workdir_that_is_gone_has_no_damaged_checkpoint(saved, tmp_path):
    workdir, aside = copy_of(saved, tmp_path), tmp_path / "aside"
    checkpoints = Checkpoints(workdir)
    workdir.rename(aside)

    def check_place():
        time.sleep(0.5)
        aside.rename(workdir)

    assert checkpoints.restore_newest(ABSTRACT, batches(), check_place)[0] == 5
    assert not (workdir / "damaged_checkpoints").exists()


def test_the_last_checkpoint_is_not_set_aside(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    for step in ("3", "4"):
        shutil.rmtree(workdir / "checkpoints" / step)
    shutil.rmtree(workdir / "checkpoints" / "5" / "state")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged \(.*\), and there is no other"):
        Checkpoints(workdir).restore_newest(ABSTRACT, batches())
    assert contents(workdir) == before


def test_evaluation_of_a_damaged_checkpoint_touches_nothing(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "5" / "state")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged .*--step=4 evaluates another"):
        Checkpoints(workdir).restore_model(5, ABSTRACT)
    assert contents(workdir) == before


@unread
def test_a_checkpoint_that_is_deleted_while_it_is_evaluated(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "3")
    with pytest.raises(UserError, match="3 was deleted while it was read; try again"):
        Checkpoints(workdir).restore_model(3, ABSTRACT)


def test_another_model_is_refused_not_set_aside(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    before = contents(workdir)
    wider = dataclasses.replace(
        ABSTRACT, opt_state={"mu": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=SHARDING)}
    )
    with pytest.raises(
        UserError, match=r"\['opt_state'\]\['mu'\] is float32\[5\] there, float32\[6\] here"
    ):
        Checkpoints(workdir).restore_newest(wider, batches())
    other = dataclasses.replace(ABSTRACT, opt_state={"nu": ABSTRACT.opt_state["mu"]})
    with pytest.raises(UserError, match=r"\['opt_state'\]\['nu'\] is not there"):
        Checkpoints(workdir).restore_newest(other, batches())
    assert contents(workdir) == before


@pytest.fixture
def small_disk(tmp_path):
    with disk(tmp_path / "disk", "1200k") as folder:  # one checkpoint takes 770 kB
        yield folder


def test_full_disk(small_disk, monkeypatch, caplog):
    """A save that failed is repeated with a newer state, until it succeeds or time is over."""
    monkeypatch.setattr(retry, "retry_seconds", 1)
    checkpoints = Checkpoints(small_disk, CheckpointConfig(every=1, keep=1))
    checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1, True))
    checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1, True))
    deadline = time.monotonic() + 60
    while not checkpoints.has_failed() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(
        MachineFault,
        match=r"checkpoints/3 cannot be saved \(No space left on device\); it was tried for 1 s",
    ):
        checkpoints.save(3, noise(3), {"next_index": 3}, Progress(1, 1, True))
    assert "checkpoints/2 cannot be saved: No space left on device" in caplog.text
    step, state, _ = Checkpoints(small_disk).restore_newest(ABSTRACT, batches())
    assert step == 1
    np.testing.assert_array_equal(state.params["kernel"], noise(1).params["kernel"])
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    checkpoints.save(4, noise(4), {"next_index": 4}, Progress(1, 1, True))
    checkpoints.close()
    assert checkpoints.saved == 4 and Checkpoints(small_disk).steps() == [4]


def test_a_fault_beside_a_save_that_succeeds(tmp_path, monkeypatch, caplog):
    """Orbax raises the first fault before the save has ended."""
    path = type(epath.Path(tmp_path))
    write, faulty = path.write_text, [OSError(errno.EIO, "the disk fails")]

    def write_slowly(self, *args, **options):
        if self.name == "_CHECKPOINT_METADATA" and faulty:
            raise faulty.pop()
        if self.name == "_METADATA":
            time.sleep(1)
        return write(self, *args, **options)

    monkeypatch.setattr(path, "write_text", write_slowly)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=1))
    checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1, True), wait=True)
    assert "checkpoints/1 is complete, but other work failed: the disk fails" in caplog.text
    step, state, _ = Checkpoints(tmp_path).restore_newest(ABSTRACT, batches())
    assert step == 1
    np.testing.assert_array_equal(state.params["kernel"], noise(1).params["kernel"])
    checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1, True))
    checkpoints.close()
    assert checkpoints.saved == 2 and Checkpoints(tmp_path).steps() == [2]


def test_process_0_of_several_finds_a_complete_checkpoint_before_the_next_save(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    checkpoints.save(3, state_of(3), {"position": 0}, Progress())
    checkpoints._manager.wait_until_finished()
    assert checkpoints.saved == 0
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert not checkpoints.has_failed() and checkpoints.saved == 3
    checkpoints.close()


def test_figures_are_not_read_whole(tmp_path):
    line = {"validation_nll": 1.0, "layers": {"load": [[0] * 5000]}}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step} | line) + "\n" for step in range(400))
    assert (tmp_path / "metrics.jsonl").stat().st_size > 5e6
    tracemalloc.start()
    try:
        assert Checkpoints(tmp_path).has_figures
        JsonLines(tmp_path / "metrics.jsonl", 50, 1).close()
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
    (aside,) = tmp_path.glob("set_aside/*/metrics.jsonl.whole")
    with aside.open() as whole, (tmp_path / "metrics.jsonl").open() as kept:
        assert sum(1 for _ in whole) == 400 and sum(1 for _ in kept) == 51


def test_a_save_into_the_mount_point_of_a_disk_does_not_count(tmp_path, caplog):
    """The disk of the workdir is unmounted when a save begins, and back at the next one."""
    workdir, disk_of_run = tmp_path / "run", tmp_path / "disk"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "owner").touch()
    checkpoints = Checkpoints(workdir)
    checkpoints.open(CheckpointConfig(every=1), 0, is_in_place=(workdir / "owner").exists)
    workdir.rename(disk_of_run)
    workdir.mkdir()
    checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1, True))
    assert not checkpoints.finish() and checkpoints.saved == 0
    assert "another process failed, or the workdir is gone or was taken over" in caplog.text
    assert step_folders(workdir) == ["1"]
    shutil.rmtree(workdir)
    disk_of_run.rename(workdir)
    checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1, True))
    assert checkpoints.saved == 2 and step_folders(workdir) == ["2"]
    checkpoints.close()


def test_an_unfinished_save_of_another_run_is_not_deleted(tmp_path, monkeypatch):
    """Its disk was mounted in the place of the workdir."""
    half = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    with pytest.raises(MachineFault, match="the workdir is gone"):
        Checkpoints(tmp_path).open(CheckpointConfig(every=1), 0, is_in_place=lambda: False)
    assert half.exists()


def test_fingerprints_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (8, 6, 4))
    tree = {"x": x, "half": x.astype(jnp.bfloat16), "n": jnp.int32(3)}
    one = fingerprints(jax.device_put(tree, SHARDING))
    spec = {"x": P("a", "b"), "half": P(None, "b", "a"), "n": P()}
    several = {name: jax.device_put(a, NamedSharding(mesh, spec[name])) for name, a in tree.items()}
    assert fingerprints(several) == one and one.keys() == {"['x']", "['half']", "['n']"}
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for place in [(0, 0, 0), (7, 5, 3)]:
        for bit in (0, 31):
            other = jax.lax.bitcast_convert_type(
                bits.at[place].set(bits[place] ^ jnp.uint32(1 << bit)), jnp.float32
            )
            assert fingerprints({"x": jax.device_put(other, SHARDING)})["['x']"] != one["['x']"]
    assert fingerprints({"x": jax.device_put(-x, SHARDING)})["['x']"] != one["['x']"]
    zeroed = jnp.ones((64, 64)).at[:8].set(0)
    assert fingerprints({"x": jax.device_put(zeroed, SHARDING)}) != fingerprints(
        {"x": jax.device_put(jnp.ones((64, 64)), SHARDING)}
    )
    swapped = jax.device_put(x.at[0].set(x[1]).at[1].set(x[0]), SHARDING)
    assert fingerprints({"x": swapped})["['x']"] != one["['x']"]


def test_a_repetition_that_differs_is_named():
    """Also on a mesh, where each device has a piece."""
    mesh = Mesh(jax.devices(), ("fsdp",), axis_types=(AxisType.Auto,))
    kernel = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        refuses_a_change({"kernel": kernel, "scale": jnp.ones(3)})
    refuses_a_change({"kernel": jnp.ones((8, 4)), "scale": jnp.ones(3)})


def refuses_a_change(state):
    first = local_fingerprints(state)
    check_repetition(7, first, state)
    with pytest.raises(MachineFault, match="step 7 had two results, which differ in process 0: a"):
        check_repetition(7, first, state | {"kernel": state["kernel"].at[7, 3].add(1e-7)})

"""Checkpoints of a small state."""

import dataclasses
import errno
import gc
import hashlib
import json
import math
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aoe_jax.config.training import CheckpointConfig
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.checkpoint_content import checksums
from aoe_jax.training.step import TrainState
from tests.runs import contents

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


def opened(workdir, config):
    checkpoints = Checkpoints(workdir)
    checkpoints.open(config)
    return checkpoints


def write(workdir, config, steps, nll=lambda step: None):
    """Saves steps in the way of training."""
    checkpoints = opened(workdir, config)
    for step in steps:
        progress = Progress(1.0, 2.0, nll(step) and {"nll": nll(step)})
        checkpoints.save(step, state_of(step), {"next_index": step}, progress)
    checkpoints.close()
    return workdir


def progress_after(step):
    validation = {"nll": 5 - step / 9}
    return Progress(step, step / 3, validation, step % 2 == 0, 7 - step, step / 7, 100 * step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Five steps, each donating its state to the next while it is saved; and the batch that follows
    each step.
    """
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = opened(workdir, CheckpointConfig(every=2, keep=3))
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state, data, following = state_of(0), batches(), {}
    batch = next(data)
    for number in range(1, 6):
        state = step(state)
        checkpoints.save(
            number,
            state,
            data.get_state(),
            progress_after(number),
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
    step, state, progress, position = Checkpoints(workdir).restore_newest(ABSTRACT)
    data.set_state(position)
    assert (step, progress) == (number, progress_after(number))
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
    assert Checkpoints(tmp_path / "run").steps() == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("half", ["6.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700000000"])
def test_half_written_checkpoint_is_ignored_and_cleared_away(saved, tmp_path, half):
    workdir = copy_of(saved, tmp_path)
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / half)
    shutil.rmtree(workdir / "checkpoints" / half / "state")
    assert Checkpoints(workdir).steps()[-1] == 5
    write(workdir, CheckpointConfig(every=1, keep=3), [6])
    assert step_folders(workdir) == ["4", "5", "6"]


def test_half_deleted_old_checkpoint_does_no_harm(saved, tmp_path):
    """A kill during the removal of an old checkpoint leaves this."""
    workdir = copy_of(saved, tmp_path)
    (workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(workdir / "checkpoints" / "3" / "run")
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 5
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
        step, state, progress, _ = Checkpoints(workdir).restore_newest(ABSTRACT)
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
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 4
    assert (workdir / "damaged_checkpoints" / "5").is_dir()


FOREIGN_OF_ORBAX = {
    "null": lambda text: "null",
    "no tree": lambda text: '{"tree_metadata": 7, "array_metadatas": 7}',
    "half": lambda text: text[: len(text) // 2],
}


@unread
@pytest.mark.parametrize("name", ["_METADATA", "array_metadatas/process_0"])
@pytest.mark.parametrize("case", FOREIGN_OF_ORBAX)
def test_what_somebody_else_wrote_for_orbax_is_damage(saved, tmp_path, name, case):
    workdir = copy_of(saved, tmp_path)
    file = workdir / "checkpoints" / "5" / "state" / name
    file.write_text(FOREIGN_OF_ORBAX[case](file.read_text()))
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 4
    assert (workdir / "damaged_checkpoints" / "5").is_dir()


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
    checkpoints = opened(tmp_path / "run", CheckpointConfig(every=1, keep=2))
    for step in (1, 2):
        checkpoints.save(step, noise(step), {"next_index": step}, Progress(1, 1))
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
        step, state, *_ = Checkpoints(workdir).restore_newest(ABSTRACT)
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
            Checkpoints(workdir).restore_newest(ABSTRACT)
    assert contents(workdir) == before
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 5


@unread
def test_damaged_several_times(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    for step in ("5", "4"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 3
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "5")
    (workdir / "checkpoints" / "5" / "run" / "metadata").write_text("{")
    assert Checkpoints(workdir).restore_newest(ABSTRACT)[0] == 3
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == [
        "4",
        "5",
        "5-1",
    ]


def test_the_last_checkpoint_is_not_set_aside(saved, tmp_path):
    workdir = copy_of(saved, tmp_path)
    for step in ("3", "4"):
        shutil.rmtree(workdir / "checkpoints" / step)
    shutil.rmtree(workdir / "checkpoints" / "5" / "state")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged \(.*\), and there is no other"):
        Checkpoints(workdir).restore_newest(ABSTRACT)
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
        Checkpoints(workdir).restore_newest(wider)
    other = dataclasses.replace(ABSTRACT, opt_state={"nu": ABSTRACT.opt_state["mu"]})
    with pytest.raises(UserError, match=r"\['opt_state'\]\['nu'\] is not there"):
        Checkpoints(workdir).restore_newest(other)
    assert contents(workdir) == before


def test_checksums_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (8, 6, 4))
    tree = {"x": x, "half": x.astype(jnp.bfloat16), "n": jnp.int32(3)}
    one = checksums(jax.device_put(tree, SHARDING))
    spec = {"x": P("a", "b"), "half": P(None, "b", "a"), "n": P()}
    several = {name: jax.device_put(a, NamedSharding(mesh, spec[name])) for name, a in tree.items()}
    assert checksums(several) == one and one.keys() == {"['x']", "['half']", "['n']"}
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for place in [(0, 0, 0), (7, 5, 3)]:
        for bit in (0, 31):
            other = jax.lax.bitcast_convert_type(
                bits.at[place].set(bits[place] ^ jnp.uint32(1 << bit)), jnp.float32
            )
            assert checksums({"x": jax.device_put(other, SHARDING)})["['x']"] != one["['x']"]
    assert checksums({"x": jax.device_put(-x, SHARDING)})["['x']"] != one["['x']"]
    zeroed = jnp.ones((64, 64)).at[:8].set(0)
    assert checksums({"x": jax.device_put(zeroed, SHARDING)}) != checksums(
        {"x": jax.device_put(jnp.ones((64, 64)), SHARDING)}
    )
    swapped = jax.device_put(x.at[0].set(x[1]).at[1].set(x[0]), SHARDING)
    assert checksums({"x": swapped})["['x']"] != one["['x']"]


def failing_saves(monkeypatch, *errors):
    """Each save raises the next error; once there is none, saves succeed."""
    save, left = ocp.CheckpointManager.save, [*errors]

    def fail(self, *args, **options):
        if left and (error := left.pop(0)):
            raise error
        return save(self, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_save_is_repeated(tmp_path, monkeypatch, caplog):
    failing_saves(monkeypatch, FULL, FULL)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    write(tmp_path, CheckpointConfig(), [3])
    assert caplog.text.count("checkpoints/3 cannot be saved (No space left on device)") == 2
    assert Checkpoints(tmp_path).restore_newest(ABSTRACT)[0] == 3


def test_a_save_that_fails_for_good(tmp_path, monkeypatch):
    """What was saved before stays, and a later save may succeed."""
    checkpoints = opened(tmp_path, CheckpointConfig(every=1, keep=1))
    checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1), wait=True)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    with monkeypatch.context() as patch:
        failing_saves(patch, *[FULL] * 99)
        wanted = r"2 cannot be saved \(No space left on device\); it was tried for 0\.1 s"
        with pytest.raises(MachineFault, match=wanted):
            checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1))
    assert checkpoints.saved == 1 and Checkpoints(tmp_path).restore_newest(ABSTRACT)[0] == 1
    checkpoints.save(3, noise(3), {"next_index": 3}, Progress(1, 1))
    checkpoints.close()
    assert checkpoints.saved == 3 and Checkpoints(tmp_path).steps() == [3]


def test_a_fault_in_the_background_is_seen_before_the_next_save(tmp_path, monkeypatch, caplog):
    """The next save is repeated until it succeeds."""
    checkpoints = opened(tmp_path, CheckpointConfig(every=1, keep=2))
    with monkeypatch.context() as patch:

        def fail(self):
            raise FULL

        checkpoints.save(1, noise(1), {"next_index": 1}, Progress(1, 1))
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        patch.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: False)
        assert checkpoints.has_failed()
    assert "checkpoints/1 cannot be saved: No space left on device" in caplog.text
    checkpoints.save(2, noise(2), {"next_index": 2}, Progress(1, 1), wait=True)
    assert checkpoints.saved == 2
    checkpoints.close()

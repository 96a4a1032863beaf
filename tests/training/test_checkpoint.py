"""Saves and restores checkpoints of a small state."""

import dataclasses
import errno
import gc
import hashlib
import json
import math
import shutil
from unittest import mock

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
from aoe_jax.training.checkpoint import Checkpoints, Progress, checksums
from aoe_jax.training.step import TrainState
from tests.runs import contents

SHARDING = jax.sharding.make_single_device_sharding(jax.devices("cpu")[0])
SIZE = 200_000  # so large that it is still being written when the next step begins


def state_of(value):
    """Returns `state_of(0)` plus a value; the kernel has random numbers, which do not compress."""

    def full(*shape, dtype=jnp.float32):
        return jnp.full(shape, value, dtype)

    kernel = value + jax.random.randint(jax.random.key(0), (SIZE,), 0, 2**20).astype(jnp.float32)
    params = {"kernel": kernel, "scale": full(3, dtype=jnp.bfloat16)}
    bias, moments = {"selection_bias": full(2, 4)}, {"mu": full(5)}
    state = TrainState(jnp.int32(value), jnp.int32(value), params, bias, moments)
    return jax.device_put(state, SHARDING)


LIKE = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SHARDING), state_of(0)
)


def assert_is_of_step(state, step):
    leaves = jax.tree.leaves(state), jax.tree.leaves(state_of(step))
    for array, wanted in zip(*leaves, strict=True):
        assert array.dtype == wanted.dtype and array.sharding == SHARDING
        np.testing.assert_array_equal(array, wanted)


def step_folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def opened(workdir, **config):
    checkpoints = Checkpoints(workdir)
    checkpoints.open(CheckpointConfig(**config))
    return checkpoints


def save(checkpoints, step, nll=None, **options):
    progress = Progress(1.0, 2.0, nll and {"nll": nll})
    checkpoints.save(step, state_of(step), progress, **options)


def write(workdir, steps, nlls=(), **config):
    checkpoints = opened(workdir, **config)
    for step in steps:
        save(checkpoints, step, dict(nlls).get(step))
    checkpoints.close()
    return workdir


def progress_after(step):
    validation = {"nll": 5 - step / 9}
    return Progress(step, step / 3, validation, step % 2 == 0, 7 - step, step / 7, 100 * step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs five steps. The state of each step is saved while it is donated to the next step.
    Returns the workdir, and the batch that follows each step.
    """
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = opened(workdir, every=2, keep=3)
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = state_of(0)
    for number in range(1, 6):
        state = step(state)
        checkpoints.save(number, state, progress_after(number))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of the run with the checkpoints of steps 3, 4 and 5."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("number", [3, 4, 5])
def test_state_may_be_donated_while_it_is_saved(workdir, number):
    """The progress is restored with the state."""
    for newer in range(number + 1, 6):
        shutil.rmtree(workdir / "checkpoints" / str(newer))
    step, state, progress = Checkpoints(workdir).restore_newest(LIKE)
    assert (step, progress) == (number, progress_after(number))
    assert_is_of_step(state, number)
    params, routing_state = Checkpoints(workdir).restore_model(number, LIKE)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    np.testing.assert_array_equal(routing_state["selection_bias"], np.full((2, 4), number))


NLLS = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 6.0, 7: 7.0}


@pytest.mark.parametrize(
    ("config", "nlls", "kept"),
    [
        ({"keep": 2}, NLLS, "67"),
        ({"keep": 1, "keep_every": 3}, NLLS, "367"),
        ({"keep": 1, "keep_best": 2}, NLLS, "247"),
        ({"keep": 2, "keep_every": 5, "keep_best": 1}, NLLS, "2567"),
        ({"keep": 1, "keep_best": 1}, NLLS | {1: math.nan, 2: math.nan, 4: math.inf}, "57"),
    ],
)
def test_what_is_kept(tmp_path, config, nlls, kept):
    """The restart of the run after step 3 does not change which checkpoints are kept."""
    write(tmp_path, range(1, 4), nlls, every=1, **config)
    write(tmp_path, range(4, 8), nlls, every=1, **config)
    assert step_folders(tmp_path) == list(kept)


def test_which_checkpoint_a_user_names(tmp_path):
    checkpoints = Checkpoints(write(tmp_path, [1, 2, 3], NLLS, keep=9))
    assert [checkpoints.find(word) for word in ("newest", "best", "1")] == [3, 2, 1]
    for word in ("4", "last", "-1", "٣", "9" * 5000):
        wanted = f"--step={word}: .*has checkpoints of steps 1, 2, 3; or give newest, best"
        with pytest.raises(UserError, match=wanted):
            checkpoints.find(word)
    unscored = Checkpoints(write(tmp_path / "unscored", [1]))
    with pytest.raises(UserError, match=r"--step=best: no checkpoint of .* has a validation nll"):
        unscored.find("best")
    nothing = Checkpoints(tmp_path / "none")
    with pytest.raises(UserError, match="has no complete checkpoint; train first"):
        nothing.find("newest")
    assert nothing.steps() == [] and not (tmp_path / "none").exists()


def test_what_a_kill_leaves(workdir):
    """Half-written checkpoints are ignored and deleted; half-deleted old ones cause no error."""
    folder = workdir / "checkpoints"
    for half in ("6.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(folder / "5", folder / half)
        shutil.rmtree(folder / half / "state")
    (folder / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(folder / "3" / "run")
    assert Checkpoints(workdir).restore_newest(LIKE)[0] == 5
    write(workdir, [6], every=1, keep=2)
    assert step_folders(workdir) == ["5", "6"]


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "flipped early": lambda path: flip_bit(path, path.stat().st_size // 5),
    "flipped": lambda path: flip_bit(path, path.stat().st_size // 2),
    "flipped late": lambda path: flip_bit(path, path.stat().st_size * 4 // 5),
    "flipped near the end": lambda path: flip_bit(path, path.stat().st_size - 9),
}


@pytest.fixture
def failing_reads():
    """Collects garbage after the test. After a failed read, Orbax leaves other reads unfinished,
    whose warnings would otherwise appear in a later test.
    """
    yield
    gc.collect()


def unread(test):
    """Marks a test with failing reads and hides the warnings of unfinished reads."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("failing_reads")(test)


@unread
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_set_aside(saved, tmp_path, damage, caplog):
    """If any single file is damaged, the restored state is the saved state of this checkpoint or of
    the checkpoint before.
    """
    newest = saved / "checkpoints" / "5"
    names = [path.relative_to(saved) for path in newest.rglob("*") if path.is_file()]
    names, aside = [name for name in names if (saved / name).stat().st_size], 0
    assert len(names) > 5
    for n, name in enumerate(names):
        workdir = shutil.copytree(saved, tmp_path / str(n))
        DAMAGE[damage](workdir / name)
        damaged = contents(workdir / "checkpoints" / "5")
        caplog.clear()
        step, state, progress = Checkpoints(workdir).restore_newest(LIKE)
        assert step == progress.loss, name
        assert_is_of_step(state, step)
        if step == 4:
            aside += 1
            assert "checkpoint of step 5 is damaged" in caplog.text, name
            assert contents(workdir / "damaged_checkpoints" / "5") == damaged
            assert step_folders(workdir) == ["3", "4"]
        else:
            assert step == 5 and not (workdir / "damaged_checkpoints").exists()
    assert aside >= 3  # some files, such as the names of processes, are not needed


def signed(**changes):
    """Changes `run/metadata` and makes its hash match again; None removes an entry."""

    def change(text):
        run = json.loads(text) | changes
        run = {name: part for name, part in run.items() if name != "sha256" and part is not None}
        sha256 = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        return json.dumps(run | {"sha256": sha256})

    return change


def of_orbax(change):
    return [("state/_METADATA", change), ("state/array_metadatas/process_0", change)]


FOREIGN = [
    ("run/metadata", signed(arrays={"params": 7})),
    ("run/metadata", signed(progress={"loss": "low"})),
    ("run/metadata", signed(progress=None)),
    *of_orbax(lambda text: "null"),
    *of_orbax(lambda text: '{"tree_metadata": 7, "array_metadatas": 7}'),
]


@unread
@pytest.mark.parametrize(("name", "change"), FOREIGN)
def test_what_somebody_else_wrote_is_damage(workdir, name, change):
    file = workdir / "checkpoints" / "5" / name
    file.write_text(change(file.read_text()))
    assert Checkpoints(workdir).restore_newest(LIKE)[0] == 4
    assert (workdir / "damaged_checkpoints" / "5").is_dir()


def test_a_checkpoint_of_an_older_version(workdir):
    old = {"loss": 1.0, "nll": 1.0, "validated": True, "skipped_in_row": 0}
    file = workdir / "checkpoints" / "5" / "run" / "metadata"
    arrays, sums = json.loads(file.read_text())["arrays"], checksums(vars(state_of(5)), rounds=1)
    arrays = {name: [*described[:2], sums[name]] for name, described in arrays.items()}
    file.write_text(signed(progress=old, arrays=arrays, data={"next_index": 5})(file.read_text()))
    step, _, progress = Checkpoints(workdir).restore_newest(LIKE)
    assert (step, progress) == (5, Progress(1.0, 1.0, metrics_bytes=None))


def test_folders_that_are_no_checkpoints(workdir):
    for name in ("007", "\N{ARABIC-INDIC DIGIT NINE}", "9" * 30, "5_copy", "lost+found"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "8").touch()
    assert Checkpoints(workdir).steps() == [3, 4, 5]
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").touch()
    with pytest.raises(UserError, match="/checkpoints is a file; move it away"):
        Checkpoints(workdir).steps()


FULL_DEVICE = "RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes."
PATIENT = r"checkpoints/5 cannot be read \(.*\); it was tried for 0\.1 s"


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), MachineFault, PATIENT),
        (OSError("Forbidden: https://storage.googleapis.com/b/x\nno"), MachineFault, PATIENT),
        (MemoryError(), MachineFault, PATIENT),
        (jax.errors.JaxRuntimeError(FULL_DEVICE), ValueError, "cannot read"),  # no second try
    ],
)
def test_a_fault_of_the_machine_is_no_damage(workdir, monkeypatch, fault, kind, words):
    """No checkpoint is set aside, because it is readable with more memory or another disk."""
    before = contents(workdir)

    def fail(*_, **__):
        raise ValueError("cannot read") from fault

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
        patch.setattr(retry, "retry_seconds", 0.1)
        with pytest.raises(kind, match=words):
            Checkpoints(workdir).restore_newest(LIKE)
    assert contents(workdir) == before
    assert Checkpoints(workdir).restore_newest(LIKE)[0] == 5


@unread
def test_damaged_several_times(workdir):
    for step in ("5", "4"):
        shutil.rmtree(workdir / "checkpoints" / step / "state")
    (workdir / "damaged_checkpoints" / "5").mkdir(parents=True)  # of an earlier start
    before = contents(workdir)
    wanted = r"checkpoints/5 is damaged .*--step=4 evaluates another"
    with pytest.raises(UserError, match=wanted):
        Checkpoints(workdir).restore_model(5, LIKE)  # evaluation sets nothing aside
    assert contents(workdir) == before
    assert Checkpoints(workdir).restore_newest(LIKE)[0] == 3
    aside = (workdir / "damaged_checkpoints").iterdir()
    assert sorted(path.name for path in aside) == ["4", "5", "5-1"]

    shutil.rmtree(workdir / "checkpoints" / "3" / "state")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"checkpoints/3 is damaged \(.*\), and there is no other"):
        Checkpoints(workdir).restore_newest(LIKE)
    assert contents(workdir) == before


def test_another_model_is_refused_not_set_aside(workdir):
    before, mu = contents(workdir), LIKE.opt_state["mu"]
    wider, half = mu.update(shape=(6,)), mu.update(dtype=jnp.bfloat16)
    for moments, words in (
        ({"mu": wider}, r"\['opt_state'\]\['mu'\] is float32\[5\] there, float32\[6\] here"),
        ({"mu": half}, r"\['opt_state'\]\['mu'\] is float32\[5\] there, bfloat16\[5\] here"),
        ({"nu": mu}, r"\['opt_state'\]\['nu'\] is not there"),
    ):
        with pytest.raises(UserError, match=words):
            Checkpoints(workdir).restore_newest(dataclasses.replace(LIKE, opt_state=moments))
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
    places = [(place, bit) for place in [(0, 0, 0), (7, 5, 3)] for bit in (0, 31)]
    flipped = [bits.at[place].set(bits[place] ^ jnp.uint32(1 << bit)) for place, bit in places]
    others = [jax.lax.bitcast_convert_type(other, jnp.float32) for other in flipped]
    for other in (*others, -x, x.at[0].set(x[1]).at[1].set(x[0])):
        assert checksums({"x": jax.device_put(other, SHARDING)})["['x']"] != one["['x']"]
    ones = jax.device_put(jnp.ones((64, 64)), SHARDING)
    assert checksums({"x": ones.at[:8].set(0)}) != checksums({"x": ones})


def test_checksums_do_not_change():
    """Otherwise every checkpoint of an older version would count as damaged."""
    tree = [jnp.arange(6.0).reshape(2, 3), jnp.int32(7), jnp.ones(3, jnp.bfloat16)]
    assert [*checksums(tree).values()] == [3717451469, 415870660, 285527380]
    assert [*checksums(tree, rounds=1).values()] == [1987116870, 2843198329, 4195160685]


FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_saves(monkeypatch, count, fault=FULL):
    """Makes the first `count` saves raise a fault."""
    real, left = ocp.CheckpointManager.save, [fault] * count

    def fail(self, *args, **options):
        if left:
            raise left.pop()
        return real(self, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)


RACES = [FileExistsError(errno.EEXIST, "File exists"), FileNotFoundError(errno.ENOENT, "No file")]


@pytest.mark.parametrize("fault", [FULL, *RACES], ids=repr)
def test_a_save_is_repeated(tmp_path, monkeypatch, caplog, fault):
    """A thread of a failed save may make and delete files that the next save makes, too."""
    failing_saves(monkeypatch, 2, fault)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    write(tmp_path, [3])
    assert caplog.text.count(f"checkpoints/3 cannot be saved ({fault.strerror})") == 2
    assert Checkpoints(tmp_path).restore_newest(LIKE)[0] == 3


def test_saves_that_fail(tmp_path, monkeypatch, caplog):
    """Older checkpoints are kept, and a later save succeeds."""
    options = mock.Mock(wraps=ocp.AsyncOptions)
    monkeypatch.setattr(ocp, "AsyncOptions", options)
    checkpoints = opened(tmp_path, every=1, keep=1, timeout=77)
    assert options.call_args.kwargs["timeout_secs"] == 77
    save(checkpoints, 1, wait=True)
    monkeypatch.setattr(retry, "retry_seconds", 0.1)
    with monkeypatch.context() as patch:
        failing_saves(patch, 99)
        wanted = r"2 cannot be saved \(No space left on device\); it was tried for 0\.1 s"
        with pytest.raises(MachineFault, match=wanted):
            save(checkpoints, 2)
    assert checkpoints.saved == 1 and Checkpoints(tmp_path).restore_newest(LIKE)[0] == 1

    def fail(self):
        raise FULL

    save(checkpoints, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        patch.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: False)
        assert checkpoints.has_failed()  # the save in the background
    assert "checkpoints/3 cannot be saved: No space left on device" in caplog.text
    save(checkpoints, 4, wait=True)
    assert checkpoints.saved == 4
    outcomes = [FULL, None]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_finish", lambda: outcomes.pop(0))
        save(checkpoints, 5)
    assert not outcomes  # after a save that failed, it waits for the next one
    checkpoints.close()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: None)
        with pytest.raises(OSError, match="checkpoint 6 is not there after its save"):
            save(checkpoints, 6, wait=True)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps()[-1] == 5  # the save of step 3 may end in the background

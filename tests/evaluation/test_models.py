"""Trained models on meshes of the user's choice."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from aoe_jax.data.pipeline import eval_batches
from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import TextTokens
from aoe_jax.evaluation.models import load_model, mesh_axes, on_devices_here
from aoe_jax.formats.loading import read_end_tokens
from tests.evaluation.models import make_config, make_model
from tests.runs import finished_run, tiny_config


@pytest.mark.slow
def test_a_run_on_another_mesh():
    model, there = load_model(finished_run(), mesh="fsdp=2,expert=4"), load_model(finished_run())
    assert (model.config.mesh.data, model.config.mesh.fsdp, model.config.mesh.expert) == (1, 2, 4)
    w_up = model.params["layers"]["experts"]["w_up"]
    assert {shard.data.shape for shard in w_up.addressable_shards} == {(2, 1, 16, w_up.shape[-1])}
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_are_what_the_devices_divide():
    # The mesh of training fits.
    assert on_devices_here(tiny_config(mesh__fsdp=4, train__batch_size=8)).mesh.fsdp == 4
    smaller = on_devices_here(tiny_config(mesh__fsdp=4))  # and here, but for the batch
    assert (smaller.mesh.data, smaller.mesh.fsdp, smaller.train.batch_size) == (2, 4, 8)
    sizes = {"model__d_model": 64, "experts__d_low": 16, "train__batch_size": 16}
    elsewhere = on_devices_here(tiny_config(mesh__fsdp=16, **sizes))
    assert (elsewhere.mesh.data, elsewhere.train.batch_size) == (8, 16)
    split = on_devices_here(tiny_config(model__unroll=2), {"fsdp": 2, "expert": 2})
    assert (split.mesh.data, split.train.batch_size, split.model.unroll) == (2, 8, 1)
    of_one_device = tiny_config(experts__kind="capacity", balance__aux_tokens=1 / 5)
    assert on_devices_here(of_one_device, {"expert": 2}).mesh.data == 4


MANY = "9" * 5000  # digits, more than Python takes as a number
FORM = "write it as fsdp=4,expert=2; the axes are data, fsdp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, f"--mesh={text}: {FORM}") for text in ("fsdp", "fsdp=0", "experts=2", "fsdp=two")),
        *((text, f"--mesh={text}: {FORM}") for text in ("fsdp=2,fsdp=2", f"fsdp={MANY}", "")),
        ("fsdp=4,expert=4", r"config\.mesh: .*must be the number of devices, 8"),
        ("expert=8", r"config\.mesh\.expert=8: must divide experts\.n_experts=4"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError, match=message):
        on_devices_here(tiny_config(), mesh_axes(text))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, caplog):
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    file = str(workdir / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.add_tokens([f"<{number}>" for number in range(512)])
    tokenizer.save(file)
    load_model(workdir)
    assert "tokens, the model 512: " in caplog.text


def test_tokens_that_end_a_text(tmp_path):
    def ends(file, token):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": token}))
        return read_end_tokens(tmp_path)

    assert ends("config.json", 7) == [7]
    assert ends("generation_config.json", None) == [7]
    assert ends("generation_config.json", [2, 5]) == [2, 5]
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.*: must be the n"):
        ends("generation_config.json", [2, "a"])
    ends("generation_config.json", None)
    assert ends("config.json", None) == []


def test_texts_of_a_corpus_begin_as_the_model_knows_it():
    model = dataclasses.replace(make_model(make_config()), start=299)
    text = TextTokens(["the state", "a cat"], model.tokenizer)
    (batch,) = eval_batches(text, 32, 1)
    inputs = np.asarray(model.put(batch)["inputs"])
    is_end = batch["inputs"] == model.tokenizer.end_of_text
    assert is_end.sum() > 2 and (inputs[is_end] == 299).all()
    np.testing.assert_array_equal(inputs[~is_end], batch["inputs"][~is_end])

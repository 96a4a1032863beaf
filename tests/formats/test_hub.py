"""Models of the hub are read like transformers reads them, in every layout of their tensors."""

import json
import shutil

import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.formats.loading import read_config
from benchmarks.parity import LAYOUTS, logits_here, logits_there, random_model, save
from tests.formats.hub import ARCHITECTURES, hub_models
from tests.formats.test_loading import change_config, edit, load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ragged")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture, layout):
    folders, logits = hub_models()[architecture]
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits_here(folders[layout]), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("mixtral", "per expert"), ("qwen3_moe", "fused"), ("dots1", "per expert")],
)
def test_straight_into_a_mesh(architecture, layout):
    folders, logits = hub_models()[architecture]
    found = logits_here(folders[layout], data=1, fsdp=2, expert=2, tensor=2)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)


def copy(tmp_path, architecture="mixtral", layout="per expert"):
    return shutil.copytree(hub_models()[architecture][0][layout], tmp_path / "model")


def test_rope_fields_of_before_transformers_5(tmp_path):
    folders, logits = hub_models()["llama"]
    directory = copy(tmp_path, "llama")
    scaling = json.loads((directory / "config.json").read_text())["rope_parameters"]
    scaling["type"] = scaling.pop("rope_type")
    theta = scaling.pop("rope_theta")
    change_config(directory, rope_parameters="removed", rope_theta=theta, rope_scaling=scaling)
    assert read_config(directory) == read_config(folders["per expert"])
    np.testing.assert_allclose(logits_here(directory), logits, rtol=0, atol=1e-4)


def test_an_output_table_beside_a_tied_one_is_ignored(tmp_path):
    """Qwen3-0.6B has one."""
    directory = copy(tmp_path, "qwen3", "fused")
    edit(directory, **{"lm_head.weight": np.zeros((96, 32), np.float32)})
    logits = hub_models()["qwen3"][1]
    np.testing.assert_allclose(logits_here(directory), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["dots1", "glm4_moe"])
def test_bfloat16_of_deepseeks_router(tmp_path, architecture):
    import torch

    save(random_model(architecture).to(torch.bfloat16), tmp_path, "per expert")
    there = logits_there(tmp_path)
    np.testing.assert_allclose(logits_here(tmp_path), there, rtol=0, atol=1e-4)
    assert read_config(tmp_path).model.dtype == "bfloat16"


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path, caplog):
    """GLM-4.5 has one, behind the last layer."""
    directory = copy(tmp_path, "glm4_moe", "fused")
    edit(directory, **{"model.layers.3.eh_proj.weight": np.ones((32, 64), np.float32)})
    with caplog.at_level("INFO"):
        logits = logits_here(directory)
    np.testing.assert_allclose(logits, hub_models()["glm4_moe"][1], rtol=0, atol=1e-4)
    assert "left out: the layer of multi-token prediction, model.layers.3" in caplog.text
    change_config(directory, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="model.layers.3.eh_proj.weight is unknown"):
        load(directory)

"""The programs and the notebook of `examples/`, with fewer steps."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from flax import nnx
from nbclient import NotebookClient

from examples import add_a_method, nnx_model, train_loop, vision
from tests.forking import ENVIRONMENT
from tests.hasty import xla_flags

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ragged")]
NOTEBOOK = Path(__file__).parents[1] / "examples/aoe_and_moe.ipynb"


def test_train_loop():
    lines = train_loop.train(steps=40)
    assert lines[-1]["nll"] < lines[0]["nll"] - 2


@pytest.mark.parametrize("layer", [nnx_model.aoe, None])
def test_nnx_model(layer):
    model = nnx_model.GPT(layer, d_model=32, n_layers=1, rngs=nnx.Rngs(0))
    text = np.frombuffer(nnx_model.TEXT.read_bytes(), np.uint8)
    losses = nnx_model.train(model, text, steps=40)
    assert losses[-1] < losses[0] - 2


def test_vision():
    found = vision.compare(epochs=4, seeds=1)
    assert set(found) == {"AoE", "MoE"}
    assert all(accuracy > 0.5 for (accuracy,) in found.values())


def test_add_a_method():
    """About half of the 8 experts have a score above the mean."""
    assert all(3 < found < 5 for found in add_a_method.experts_per_token().values())


def test_notebook(monkeypatch):
    """The notebook runs, and its committed outputs are from a run of all cells in order."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert committed == list(range(1, len(committed) + 1))
    for name, value in (ENVIRONMENT | {"XLA_FLAGS": xla_flags(), "NOTEBOOK_STEPS": "2"}).items():
        monkeypatch.setenv(name, value)
    for cell in notebook.cells:  # smaller and fewer batches
        smaller = cell.source.replace("BATCH, LENGTH = 32", "BATCH, LENGTH = 4")
        cell.source = smaller.replace("range(16)", "range(2)")
    place = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(notebook, timeout=300, resources=place).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    assert len(figures) == 2

"""The picture of a run: what it draws, and that a run survives without it."""

import json

import numpy as np
import pytest
from PIL import Image

from aoe_jax.training.picture import draw_run, write_picture
from tests.runs import dense_command, finished_run, kind_run, read_metrics, run


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curves(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_it_has_the_losses_and_loads_of_the_run():
    lines, validations = read_metrics(finished_run())
    loss, load = draw_run(lines_of(finished_run()), "title").axes
    train, validation = (curves(loss)[name] for name in ("training batches", "validation split"))
    np.testing.assert_array_equal(train, [(line["step"], line["nll"]) for line in lines])
    wanted = [(line["step"], line["validation_nll"]) for line in validations]
    np.testing.assert_array_equal(validation, wanted)
    for layer in range(2):
        wanted = [(line["step"], line["layers"]["load_max_over_mean"][layer]) for line in lines]
        np.testing.assert_array_equal(curves(load)[f"layer {layer}"], wanted)


def test_a_dense_model_has_no_load():
    workdir, _ = kind_run("dense")
    assert len(draw_run(lines_of(workdir), "title").axes) == 1


def test_a_steep_beginning_does_not_hide_the_rest():
    lines = [{"step": step, "nll": 2 + 100 * (step == 1)} for step in range(1, 101)]
    (axes,) = draw_run(lines, "title").axes
    assert axes.get_ylim()[1] < 3


@pytest.mark.parametrize("n_layers", [1, 40])
def test_any_number_of_layers(n_layers):
    layers = {"load_max_over_mean": [1.5] * n_layers}
    lines = [{"step": step, "nll": 3.0, "layers": layers} for step in (1, 2)]
    assert len(draw_run(lines, "title").axes[1].lines) == n_layers + 1  # and that of balance


@pytest.mark.parametrize("n_lines,marker", [(1, "o"), (2, "None")])
def test_a_single_step_is_a_point(n_lines, marker):
    layers = {"load_max_over_mean": [1.5, 2.0]}
    lines = [{"step": 3 + i, "nll": 3.0, "layers": layers} for i in range(n_lines)]
    loss, load = draw_run(lines, "title").axes
    drawn = {line.get_label(): line.get_marker() for line in (*loss.lines, *load.lines)}
    assert {drawn[name] for name in ("training batches", "layer 0", "layer 1")} == {marker}


def test_losses_that_are_missing(tmp_path):
    """A run whose only loss is not finite, and one that has logged nothing."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "nll": null}\n')
    for name in ("metrics.jsonl", "none.jsonl"):
        write_picture(tmp_path / name, tmp_path / "picture.png", "title")
        with Image.open(tmp_path / "picture.png") as picture:
            assert min(picture.size) > 300


def test_a_run_draws_it_and_survives_without(tmp_path):
    with Image.open(finished_run() / "training.png") as picture:
        assert picture.size[0] > 2 * picture.size[1]
    (tmp_path / "training.png").mkdir()
    status, stdout, stderr = run(dense_command(tmp_path, train__steps=2, train__warmup=0.5))
    assert status == 0, stderr
    assert "training.png cannot be written (Is a directory); the run goes on" in stderr
    assert "--workdir" in stdout

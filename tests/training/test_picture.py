"""The picture of a run: what it shows, and that a run continues if it cannot be drawn."""

import json

import numpy as np
from PIL import Image

from aoe_jax.training.picture import draw_run, write_picture
from tests.runs import dense_command, finished_run, read_metrics, run


def curves(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_it_has_the_losses_and_loads_of_the_run():
    train, validation = read_metrics(finished_run())
    text = (finished_run() / "metrics.jsonl").read_text()
    loss, load = draw_run([*map(json.loads, text.splitlines())], "title").axes
    drawn = curves(loss) | curves(load)
    expected = {
        "training batches": [(line["step"], line["nll"]) for line in train],
        "validation split": [(line["step"], line["validation_nll"]) for line in validation],
    }
    for layer in range(2):
        ratios = [(line["step"], line["layers"]["load_max_over_mean"][layer]) for line in train]
        expected[f"layer {layer}"] = ratios
    for name, points in expected.items():
        np.testing.assert_array_equal(drawn[name], points)


def test_a_steep_beginning_does_not_hide_the_rest():
    """A single step is drawn as a point, and there may be many layers."""
    for n_steps, n_layers in ((1, 1), (100, 40)):
        layers = {"load_max_over_mean": [1.5] * n_layers}
        lines = [
            {"step": i, "nll": 2 + 100 * (i == 1), "layers": layers} for i in range(1, n_steps + 1)
        ]
        loss, load = draw_run(lines, "title").axes
        *drawn, _ = load.lines  # the last line marks perfect balance
        assert len(drawn) == n_layers and (n_steps == 1 or loss.get_ylim()[1] < 3)
        markers = {line.get_marker() for line in (loss.lines[0], *drawn)}
        assert markers == {"o" if n_steps == 1 else "None"}


def test_losses_that_are_missing(tmp_path):
    """A picture is drawn if the only loss is not finite, and if the run has logged nothing."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "nll": null}\n')
    for name in ("metrics.jsonl", "none.jsonl"):
        write_picture(tmp_path / name, tmp_path / "picture.png", "title")
        with Image.open(tmp_path / "picture.png") as picture:
            assert min(picture.size) > 300


def test_a_run_survives_without(tmp_path):
    with Image.open(finished_run() / "training.png") as picture:
        assert picture.size[0] > 2 * picture.size[1]
    (tmp_path / "training.png").mkdir()
    status, stdout, stderr = run(dense_command(tmp_path, train__steps=2, train__warmup=0.5))
    assert status == 0, stderr
    assert "training.png cannot be written (Is a directory); the run goes on" in stderr
    assert "--workdir" in stdout

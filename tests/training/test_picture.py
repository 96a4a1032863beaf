"""The picture of a run, or of several: what it shows; and that a run continues without it."""

import json

import numpy as np
import pytest
from PIL import Image

from aoe_jax.errors import UserError
from aoe_jax.training.picture import draw_runs
from tests.in_process import call
from tests.runs import dense_command, finished_run, read_metrics, run


def lines_of(n_steps, n_layers, nll=2.0, speed=100.0):
    """The lines of a run with a first loss that is far higher than the others."""
    layers = {"load_max_over_mean": [1.5 + layer for layer in range(n_layers)]} if n_layers else {}
    return [
        {"step": i, "nll": nll + 100 * (i == 1), "layers": layers, "tokens_per_second": speed}
        for i in range(1, n_steps + 1)
    ]


def test_it_has_the_losses_loads_and_speeds_of_the_run():
    train, validation = read_metrics(finished_run())
    text = (finished_run() / "metrics.jsonl").read_text()
    panels = draw_runs({"run": [*map(json.loads, text.splitlines())]}, "title").axes
    (raw, _, points), (*layers, balanced), (speed,) = (panel.lines for panel in panels)
    drawn = [raw, points, *layers, speed]
    expected = [[(line["step"], line["nll"]) for line in train]]
    expected += [[(line["step"], line["validation_nll"]) for line in validation]]
    for layer in range(2):
        loads = [line["layers"]["load_max_over_mean"][layer] for line in train]
        expected += [[(line["step"], load) for line, load in zip(train, loads, strict=True)]]
    expected += [[(line["step"], line["tokens_per_second"]) for line in train]]
    for line, values in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), values)
    assert balanced.get_label() == "balanced" and set(balanced.get_ydata()) == {1}


def test_a_steep_beginning_does_not_hide_the_rest():
    """A single step is drawn as a point, and there may be many layers."""
    for n_steps, n_layers in ((1, 1), (100, 40)):
        loss, load, _ = draw_runs({"run": lines_of(n_steps, n_layers)}).axes
        *drawn, _ = load.lines  # the last line marks perfect balance
        assert len(drawn) == n_layers and (n_steps == 1 or loss.get_ylim()[1] < 3)
        markers = {line.get_marker() for line in (loss.lines[1], *drawn)}
        assert markers == {"o" if n_steps == 1 else "None"}


def test_losses_that_are_missing():
    """A picture is drawn if the only loss is not finite, and if the run has logged nothing."""
    for lines in ([], [{"step": 1, "nll": None}]):
        assert len(draw_runs({"run": lines}).axes) == 2


def test_several_runs():
    """Each run has one line in each panel; a dense one has no load. The legend has their names."""
    runs = {"b": lines_of(9, 2), "a": lines_of(5, 0, nll=3.0), "c": lines_of(7, 4)}
    figure = draw_runs(runs)
    loss, load, speed = figure.axes
    assert [len(panel.lines) for panel in (loss, load, speed)] == [9, 3, 3]
    assert [line.get_ydata()[0] for line in load.lines] == [2, 3, 1]  # means over layers; balance
    (names,) = figure.legends
    assert [text.get_text() for text in names.get_texts()] == ["a", "b", "c"]  # by last loss
    colours = [line.get_color() for line in speed.lines]
    assert len(set(colours)) == 3 and [line.get_color() for line in loss.lines[1::3]] == colours


def test_the_command(tmp_path, capsys):
    """Runs whose folders have the same name are drawn, too."""
    lines = "".join(json.dumps(line) + "\n" for line in lines_of(3, 2))
    for folder in (tmp_path / "a/run", tmp_path / "b/run"):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(lines)
    runs, picture = f"--runs={tmp_path}/a/run,{tmp_path}/b/run", tmp_path / "picture.png"
    call("aoe_jax.plot", runs, f"--output={picture}")
    assert capsys.readouterr().out == f"wrote {picture}\n"
    with Image.open(picture) as image:
        assert image.size[0] == 644 and image.size[1] > 800


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--runs is missing"),
        (["--runs=/nowhere"], "--runs=/nowhere: there is no such folder"),
        (["--runs={}"], "--runs=.*: metrics.jsonl there has no step yet, or is missing"),
        (["--runs={}", "--output=x.pdf"], r"--output=x.pdf: must end in \.png"),
        (["--runs={}", "--output="], r"--output=: must end in \.png"),
    ],
)
def test_mistakes(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        call("aoe_jax.plot", *(argument.format(tmp_path) for argument in arguments))


def test_a_run_survives_without(tmp_path):
    with Image.open(finished_run() / "training.png") as picture:
        assert picture.size[1] > picture.size[0]
    (tmp_path / "training.png").mkdir()
    status, stdout, stderr = run(dense_command(tmp_path, train__steps=2, train__warmup=0.5))
    assert status == 0, stderr
    assert "training.png cannot be written (Is a directory); the run goes on" in stderr
    assert "--workdir" in stdout

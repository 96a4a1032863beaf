"""Commands of benchmarks on tiny shapes: their figures, and mistakes on their command lines."""

import json

import numpy as np
import pytest

from tests.runs import run, write_texts


@pytest.fixture
def benchmark(tmp_path):
    """Runs a benchmark; returns the content of `--json` and stdout."""

    def result(name, *arguments):
        file = tmp_path / "figures.json"
        status, stdout, stderr = run(["-m", f"benchmarks.{name}", *arguments, f"--json={file}"])
        assert status == 0, stderr
        return json.loads(file.read_text()), stdout

    return result


@pytest.mark.slow
def test_grouped_products_and_layers(benchmark):
    shapes = ["--shapes=64x8x16x4,50x8x8x3", "--backends=auto,ragged", "--repeats=2"]
    result, stdout = benchmark("grouped_matmul", *shapes)
    assert result["machine"]["allocator"].startswith("glibc.malloc")
    products = result["figures"]
    assert [figure["backend"] for figure in products] == 2 * ["dense", "auto", "ragged"]
    assert products[0]["ratio"] == 1 and len(stdout.splitlines()) == 1 + len(products)

    result, _ = benchmark("layer", "--shapes=24x4x2x16", "--tokens=40", "--repeats=2")
    useful = {figure["layer"]: figure["useful_ratio"] for figure in result["figures"]}
    assert list(useful) == ["dense", "router", "aoe"]
    # A score is d = 24 products a token and expert; an expert is 3 d f, two of which are the
    # baseline.
    assert useful["router"] == pytest.approx(1 + 4 * 24 / (2 * 3 * 24 * 16))


@pytest.mark.slow
def test_decoding(benchmark):
    sizes = ["--d_model=16", "--layers=1", "--length=16", "--batches=3", "--repeats=1"]
    result, _ = benchmark("decoding", *sizes)
    figures = {figure["model"]: figure for figure in result["figures"]}
    assert len(figures) == 7
    # Weights of a token: attention and table, and of a router MoE the chosen experts, of AoE all
    # w_gate_down besides.
    table, attention, expert = 4096 * 16, 4 * 16 * 16, 3 * 16 * 32
    shared, w_down = table + attention + 3 * 16, 16 * 5
    d_wide = round((3 * 16 * 32 - 5 * 16) / (5 + 2 * 16))
    chosen = 2 * (w_down + 5 * d_wide + 2 * 16 * d_wide)
    for model, weights in {
        "router, 2 of 8": shared + 16 * 8 + 2 * expert,
        "dense, as wide as all experts": shared + 8 * expert,
        "AoE, 2 of 8, r=d/3": shared + chosen + 6 * w_down,
    }.items():
        assert figures[model]["bytes"] == 4 * weights, model


@pytest.mark.slow
def test_input(tmp_path, benchmark):
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name, seed=seed)
    data = f"text@{tmp_path / 'a'}, text@{tmp_path / 'b'}"
    result, _ = benchmark("input", f"--data={data}", f"--cache={tmp_path / 'cache'}", "--steps=1")
    for figure in result["figures"]:
        assert figure["tokens"].keys() == {"a", "b"} and min(figure["tokens"].values()) > 1000
        assert 0 < figure["share"] <= figure["largest_share"] < 1


@pytest.mark.slow
def test_prepare(benchmark):
    result, _ = benchmark("prepare", "--vocab_size=300", "--repeats=1", "--documents=50")
    for figure in result["figures"]:
        assert figure["prepare_to_library"] > 0 and min(figure["mb_per_second"].values()) > 0


@pytest.mark.slow
def test_two_stage(tmp_path, benchmark):
    sizes = ["--seeds=2", "--steps=3", "--d_model=8", f"--output={tmp_path / 'pictures'}"]
    result, _ = benchmark("two_stage", *sizes)
    figures = {figure["arm"]: figure["stages"] for figure in result["figures"]}
    assert len(figures) == 4
    for stage in (stage for stages in figures.values() for stage in stages):
        share = np.array(stage["share"])
        assert share.shape == (2, 3, 2) and np.allclose(share.sum(axis=-1), 1)
        assert sum(stage["endings"].values()) == 2
    # Without a gradient a router chooses as it was drawn.
    first, second = figures["router, weight of 1"]
    assert first["share"] == second["share"]
    assert (tmp_path / "pictures/two_stage.png").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["grouped_matmul", "--shapes=64x8"], "--shapes=64x8: four numbers MxDxFxE"),
        (["step", "--models=huge"], "--models=huge: choose one of tiny, deep, sparse"),
        (["maxtext", "--python=p"], "--topology is missing"),
        (["two_stage", "--seeds=1"], "--seeds=1: 1 is not integer >= 2"),
    ],
)
def test_mistakes(command, message):
    program, *arguments = command
    status, _, stderr = run(["-m", f"benchmarks.{program}", *arguments])
    assert status == 2 and message in stderr and "Traceback" not in stderr

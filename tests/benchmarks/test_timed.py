"""The timed benchmarks as commands, on shapes that take no time: what they print and write, not how
fast anything is.
"""

import json

import pytest

from tests.runs import run, write_texts

COMMANDS = {
    "grouped_matmul": ["--shapes=64x8x16x4,50x8x8x3", "--backends=auto,ragged"],
    "layer": ["--shapes=24x4x2x16", "--tokens=40"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_figures(name, tmp_path):
    file = tmp_path / "figures.json"
    status, stdout, stderr = run(
        ["-m", f"benchmarks.{name}", "--repeats=2", f"--json={file}", *COMMANDS[name]]
    )
    assert status == 0, stderr
    result = json.loads(file.read_text())
    assert (
        result["machine"]["allocator"].startswith("glibc.malloc")
        and result["machine"]["cores"] >= 1
    )
    timed = [figure for figure in result["figures"] if "phases_ms" not in figure]
    if name == "grouped_matmul":
        assert [figure["backend"] for figure in timed] == 2 * ["dense", "auto", "ragged"]
        assert timed[0]["forward_ratio"] == 1 and all(
            figure["forward_backward_ms"] > 0 for figure in timed
        )
    else:
        assert [figure["layer"] for figure in timed][:3] == ["dense", "router", "aoe"]
        useful = {figure["layer"]: figure["useful_ratio"] for figure in timed}
        # A score is d = 24 products a token and expert; an expert is 3 d f, two of which are the
        # baseline.
        assert useful["router"] == pytest.approx(1 + 4 * 24 / (2 * 3 * 24 * 16))
        assert useful["aoe"] < useful["aoe, L_aux of 1/8"] < useful["aoe as published"]
        phases = result["figures"][-1]["phases_ms"]
        assert list(phases) == ["score", "route", "dispatch", "experts", "combine"]
    assert len(stdout.splitlines()) == 1 + len(result["figures"])


@pytest.mark.slow
def test_decoding(tmp_path):
    file = tmp_path / "figures.json"
    command = [
        "-m",
        "benchmarks.decoding",
        "--d_model=16",
        "--layers=1",
        "--length=16",
        "--batches=3",
        "--repeats=1",
    ]
    status, stdout, stderr = run([*command, f"--json={file}"])
    assert status == 0, stderr
    figures = json.loads(file.read_text())["figures"]
    assert [figure["batch"] for figure in figures] == 7 * [3]
    of = {figure["model"]: figure for figure in figures}
    assert [figure["contrasting"] is not None for figure in figures] == [True, True, *5 * [False]]
    # Weights of a token: attention and table, and of a router MoE the chosen experts, of AoE all
    # w_gate_down besides.
    table, attention, expert = 4096 * 16, 4 * 16 * 16, 3 * 16 * 32
    router, aoe = of["router, 2 of 8"], of["AoE, 2 of 8, r=d/3"]
    assert router["bytes"] == 4 * (table + attention + 3 * 16 + 16 * 8 + 2 * expert)
    assert of["dense, as wide as all experts"]["bytes"] == 4 * (
        table + attention + 3 * 16 + 8 * expert
    )
    w_down, d_wide = 16 * 5, round((3 * 16 * 32 - 5 * 16) / (5 + 2 * 16))
    chosen = 2 * (w_down + 5 * d_wide + 2 * 16 * d_wide)
    assert aoe["bytes"] == 4 * (table + attention + 3 * 16 + chosen + 6 * w_down)
    assert aoe["to_router"] == pytest.approx(aoe["step_seconds"] / router["step_seconds"])
    assert {name for name, figure in of.items() if figure["recomputing"]} == {
        "router, 2 of 8",
        "AoE, 2 of 8, r=d/3",
    }
    assert len([line for line in stdout.splitlines() if "from the start" in line]) == 2


@pytest.mark.slow
def test_input(tmp_path):
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name, seed=seed)
    data, file = f"text@{tmp_path / 'a'}, text@{tmp_path / 'b'}", tmp_path / "figures.json"
    command = ["-m", "benchmarks.input", f"--data={data}", f"--cache={tmp_path / 'cache'}"]
    status, stdout, stderr = run([*command, "--steps=1", f"--json={file}"])
    assert status == 0, stderr
    figures = json.loads(file.read_text())["figures"]
    assert [figure["arm"] for figure in figures] == ["reading ahead", "without"]
    for figure in figures:
        assert figure["tokens"].keys() == {"a", "b"} and min(figure["tokens"].values()) > 1000
        assert 0 < figure["share"] <= figure["largest_share"] < 1
        assert f"{figure['arm']}: step {figure['step_ms']:.0f} ms" in stdout


@pytest.mark.slow
def test_prepare(tmp_path):
    file = tmp_path / "figures.json"
    command = ["-m", "benchmarks.prepare", f"--json={file}", "--vocab_size=300"]
    status, stdout, stderr = run([*command, "--repeats=1", "--documents=50"])
    assert status == 0, stderr
    figures = json.loads(file.read_text())["figures"]
    assert [figure["tokenizer"] for figure in figures] == ["bpe:300", "SentencePiece"]
    for figure in figures:
        assert figure["prepare_to_library"] > 0 and min(figure["mb_per_second"].values()) > 0
    status, stdout, stderr = run(
        [*command, f"--workdir={tmp_path / 'large'}", "--size=1.3e7", "--processes=1"]
    )
    assert status == 0, stderr
    (figure,) = json.loads(file.read_text())["figures"]
    assert 1.3e7 <= figure["text_bytes"] < 1.4e7 and figure["largest_memory_bytes"] > 5e7
    assert "Killed 2 times, it ended with the same shards" in stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["grouped_matmul", "--shapes=64x8"], "--shapes=64x8: four numbers MxDxFxE"),
        (["grouped_matmul", "--shapes=64x8x0x2"], "every size must be greater than 0"),
        (["step", "--models=huge"], "--models=huge is unknown; choose from tiny, deep, sparse"),
        (["grouped_compile", "--generations=v1"], "--generations=v1 is unknown; choose from v4"),
        (["plans", "--rows=big"], "--rows=big is unknown; choose from 732M@v5e, 732M@v5p"),
        (["prepare", "--workdir=benchmarks"], "benchmarks exists already; name a new directory"),
    ],
)
def test_mistakes(command, message):
    program, *arguments = command
    status, _, stderr = run(["-m", f"benchmarks.{program}", *arguments])
    assert status == 2 and message in stderr and "Traceback" not in stderr

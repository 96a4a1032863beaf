"""The figures of attention by backend, for a TPU that is not here."""

import json

from tests.runs import run


def test_figures_of_both_backends(tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--shapes=1x2x1x256x64", f"--json={file}"]
    status, stdout, stderr = run(["-m", "benchmarks.attention", *arguments])
    assert status == 0, stderr
    splash, blocks = json.loads(file.read_text())
    assert (splash["backend"], blocks["backend"]) == ("splash", "blocks")
    least = 2 * 12 * 256 * 64  # q, k, v, the output, and the gradients of the four
    for figure in (splash, blocks):
        assert figure["hbm_traffic_bytes"] >= least and figure["likely_seconds"] > 0
    assert "v5e 1x2x1x256x64 splash: temporary 0.0" in stdout

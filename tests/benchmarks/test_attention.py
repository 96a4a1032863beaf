"""The figures of attention by backend, for a TPU that is not here."""

import json

from tests.runs import run


def test_splash_takes_less_memory_than_blocks(tmp_path):
    file = tmp_path / "figures.json"
    arguments = ["--shapes=4x4x2x2048x64", f"--json={file}"]
    status, stdout, stderr = run(["-m", "benchmarks.attention", *arguments])
    assert status == 0, stderr
    splash, blocks = json.loads(file.read_text())
    assert (splash["backend"], blocks["backend"]) == ("splash", "blocks")
    for name in ("temp_bytes", "hbm_traffic_bytes", "likely_seconds"):
        assert splash[name] < 0.7 * blocks[name]
    assert "v5e 4x4x2x2048x64 splash: temporary 0.0" in stdout

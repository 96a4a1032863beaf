"""A short soak, and that it can fail."""

import shutil
from types import SimpleNamespace

import pytest

from benchmarks import soak
from tests.runs import start


def test_three_kills(tmp_path, monkeypatch):
    forking = SimpleNamespace(PIPE=None, Popen=lambda command, **options: start(command[1:]))
    monkeypatch.setattr(soak, "subprocess", forking)
    files = soak.speech_files()[:20]
    monkeypatch.setattr(soak, "speech_files", lambda: files)
    settings = {
        "model.n_layers": 1,
        "experts.kind": "dense",
        "balance.aux_weight": 0.0,
        "balance.bias_rate": 0.0,
        "train.steps": 60,
        "train.eval_every": 30,
        "model.vocab_size": 512,
        "data.seq_len": 32,
    }
    figures = soak.soak(tmp_path / "soak", kills=3, terms=1, seed=1, settings=settings)
    assert sum(figures["stops"].values()) == 4
    whole = tmp_path / "soak" / "whole"
    wanted = soak.result(whole)
    soak.compare(tmp_path / "soak" / "run_0", wanted)

    other = shutil.copytree(whole, tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines.replace('"step": 30', '"step": 31', 1))
    with pytest.raises(soak.Failure, match=r"lines of metrics\.jsonl of .* differ"):
        soak.compare(other, wanted)
    newest = max((other / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest / "state")
    with pytest.raises(soak.Failure, match="cannot be read"):
        soak.check_checkpoints(other)

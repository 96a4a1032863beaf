"""Short soaks of one process and of two, and that a soak can fail."""

import shutil

import pytest

from benchmarks import soak
from tests.hasty import xla_flags

pytestmark = pytest.mark.slow
SETTINGS = {
    "model.n_layers": 1,
    "experts.kind": "dense",
    "balance.aux_weight": 0.0,
    "balance.bias_rate": 0.0,
    "train.steps": 60,
    "train.eval_every": 30,
    "model.vocab_size": 512,
    "data.seq_len": 32,
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    files = soak.speech_files()[:20]
    monkeypatch.setattr(soak, "speech_files", lambda: files)
    monkeypatch.setattr(soak, "LONGEST", 2)
    monkeypatch.setenv("XLA_FLAGS", xla_flags())


def test_one_process(tmp_path):
    figures = soak.soak(tmp_path / "soak", kills=3, terms=1, seed=1, settings=SETTINGS)
    assert sum(figures["events"].values()) == 4
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


def test_two_supervised_processes(tmp_path):
    figures = soak.soak_supervised(tmp_path / "soak", 2, n_events=6, seed=1, settings=SETTINGS)
    assert sum(figures["events"].values()) == 6 and figures["runs_finished"] >= 1

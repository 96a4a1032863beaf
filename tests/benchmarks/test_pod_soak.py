"""A short soak of two supervised processes."""

from benchmarks import pod_soak, soak
from tests.hasty import xla_flags


def test_twenty_events(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    files = soak.speech_files()[:20]
    monkeypatch.setattr(soak, "speech_files", lambda: files)
    monkeypatch.setattr(pod_soak, "LONGEST", 2)
    settings = {
        "model.n_layers": 1,
        "experts.kind": "dense",
        "balance.aux_weight": 0.0,
        "balance.bias_rate": 0.0,
        "model.vocab_size": 512,
        "train.steps": 60,
        "train.eval_every": 0,
        "data.seq_len": 32,
    }
    figures = pod_soak.soak(tmp_path / "soak", 2, events=20, seed=1, settings=settings)
    assert sum(figures["events"].values()) == 20 and figures["runs_finished"] >= 1

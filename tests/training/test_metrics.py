"""The metrics of a run, and how its time is split."""

import dataclasses
import json
import math
import time

import jax
import numpy as np
import pytest

from aoe_jax.errors import DivergedError
from aoe_jax.evaluation.loads import load_statistics
from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.moe.load_balance import LayerStats, load_spread
from aoe_jax.training.checkpoint import Progress
from aoe_jax.training.metrics import Metrics, layer_metrics
from aoe_jax.training.validation import Evaluation
from tests.runs import computed, read_events, tiny_config

LAYERS, EXPERTS = 2, 4
TOKENS = 4 * 32  # tokens per step of `tiny_config`
SCALARS = ("loss", "nll", "aux_loss", "grad_norm", "update_norm", "param_norm", "learning_rate")
SPLIT = ("input_seconds", "checkpoint_seconds", "compute_seconds")


def metrics_of(step, experts=EXPERTS):
    scores = np.linspace(0, 1, LAYERS * experts, dtype=np.float32)
    return {
        **{name: np.float32(step + i) for i, name in enumerate(SCALARS)},
        "skipped": np.int32(3),
        "load": np.full((LAYERS, experts), 2 / experts, np.float32),
        "confidence_entropy": np.array([0.5, 0.7], np.float32),
        "mean_score": scores.reshape(LAYERS, experts),
    }


def evaluation_of(nll=3.5, load=0.5):
    load = np.full((LAYERS, EXPERTS), load)
    stats = LayerStats(load, load, np.ones(LAYERS), load, np.ones(LAYERS))
    return Evaluation(nll * 100, 100, 400, stats)


def opened(workdir, start_step=0, progress=None, began=0.0, **changes):
    config = tiny_config(train__log_every=1, **changes)
    progress = progress or Progress(validation={"nll": 3.5})
    metrics = Metrics(workdir, config, start_step, progress, began)
    metrics.open(lambda: None)
    return metrics


def report(metrics, step, of_step):
    metrics.step(step, dict.fromkeys(("finite", "updated"), np.bool_(True)) | of_step)
    metrics.flush()


@pytest.fixture
def metrics(tmp_path):
    metrics = opened(tmp_path)
    yield metrics
    metrics.close()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_events_hold_the_metrics(metrics, tmp_path, caplog):
    caplog.set_level("INFO")
    load = np.array([[0.5, 0.5, 0.5, 0.5], [1.25, 0.75, 0, 0]], np.float32)
    report(metrics, 5, metrics_of(5) | {"load": load, "z_loss": np.float32(7.5)})
    sources = {"books": evaluation_of(2.0), "news": evaluation_of(4.0)}
    metrics.validation(10, dataclasses.replace(evaluation_of(3.0), sources=sources))
    assert ("validation/nll", 10) in read_events(tmp_path)  # a kill would lose no event
    metrics.close()
    assert "| load entropy 1.024 of 1.386, 2 dead experts | " in caplog.text
    train, validation = lines(tmp_path)
    layers = train.pop("layers")
    entropies = [np.log(4), -0.625 * np.log(0.625) - 0.375 * np.log(0.375)]
    expected = {"step": 5, "skipped": 3, "z_loss": 7.5}
    expected |= {name: 5 + i for i, name in enumerate(SCALARS)}
    expected |= {"load_entropy": np.mean(entropies), "load_spread": 1.25}
    expected |= {"confidence_entropy": 0.6, "experts_per_token": 2}
    assert computed(train) == pytest.approx(expected)
    assert layers == {
        "load_entropy": pytest.approx(entropies),
        "load_max_over_mean": [1, 2.5],
        "dead_experts": [0, 2],
        "confidence_entropy": [0.5, 0.7],
        "mean_score": [0.21428573, 0.7857143],
    }
    bits = 100 / math.log(2) / 400
    figures = {"nll": 3, "bits_per_byte": 3 * bits, "nll/books": 2, "bits_per_byte/books": 2 * bits}
    figures |= {"nll/news": 4, "bits_per_byte/news": 4 * bits}
    expected = {f"validation_{name}": value for name, value in figures.items()}
    assert computed(validation) == pytest.approx({"step": 10} | expected)

    found = read_events(tmp_path)
    shown = {name: found[f"validation/{name}", 10].simple_value for name in figures}
    assert shown == pytest.approx(figures)
    assert found["train/loss", 5].simple_value == 5
    assert found["train/load_spread", 5].simple_value == 1.25
    assert found["experts/dead_experts/layer_1", 5].simple_value == 2
    norms, loads = (found[f"histograms/{name}/layer_1", 5].histo for name in ("mean_score", "load"))
    assert (norms.num, norms.max, norms.sum) == pytest.approx((EXPERTS, 1.0, 22 / 7))
    assert (loads.num, loads.min, loads.max) == (EXPERTS, 0, 1.25) and sum(loads.bucket) == EXPERTS


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clocks of the metrics by one that advances only in `time.sleep`."""
    now = [1000.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)


def test_time_is_split_and_gives_the_speed(clock, metrics, tmp_path, caplog):
    """The time of evaluation and compilation is not part of any speed."""
    caplog.set_level("INFO")
    with metrics.clock("compile"):
        time.sleep(9.0)
    metrics.begin({}, jax.jit(lambda: 0).lower().compile())
    for name, seconds in {"input": 0.2, "checkpoint": 0.1, "evaluation": 0.4}.items():
        with metrics.clock(name):
            time.sleep(seconds)
    metrics.validation(2, evaluation_of())
    with metrics.clock("evaluation"):
        time.sleep(0.1)
    metrics.validation(2, evaluation_of())
    time.sleep(0.3)
    report(metrics, 2, metrics_of(2))
    time.sleep(3.0)
    report(metrics, 4, metrics_of(4))
    assert "| input 33.3%, checkpoint 16.7% | " in caplog.text
    assert "| 0:00:30 left" in caplog.text  # 20 steps of 1.5 s
    validation, again, first, second = lines(tmp_path)
    assert [first[name] for name in SPLIT] == pytest.approx([0.2, 0.1, 0.3])
    assert validation["validation_seconds"] == pytest.approx(0.4)
    assert again["validation_seconds"] == pytest.approx(0.1)
    assert first["tokens_per_second"] == pytest.approx(2 * TOKENS / 0.6)
    assert second["input_seconds"] == second["checkpoint_seconds"] == 0
    timing = metrics.summary(4, 9.0)["timing"]
    assert timing["input_seconds"] == first["input_seconds"]
    compute = first["compute_seconds"] + second["compute_seconds"]
    assert timing["compute_seconds"] == pytest.approx(compute)
    assert timing["evaluation_seconds"] == pytest.approx(0.5)
    total = sum(timing[name] for name in SPLIT)
    assert timing["tokens_per_second"] == pytest.approx(4 * TOKENS / total)

    speed, n = first["tokens_per_second"], jax.device_count()
    assert first["tokens_per_second_per_device"] == pytest.approx(speed / n)
    flops = training_flops_per_token(tiny_config()) * speed / n
    assert first["flops_per_second_per_device"] == pytest.approx(flops)
    assert "mfu" not in first  # the peak of a CPU is unknown
    metrics._peak = 4 * flops
    assert metrics._speed(2, 0.6)["mfu"] == pytest.approx(0.25)
    assert 1e7 < first["host_memory_bytes"] <= first["host_memory_peak_bytes"]


def test_goodput_counts_the_steps_that_are_kept(clock, tmp_path):
    """All starts count. The first start computes steps 1 to 4, and a kill loses steps 3 and 4."""
    began, progress = time.time() - 10, None
    for start_step in (0, 2):
        metrics, kept = opened(tmp_path, start_step, progress, began), None
        for step in (start_step + 2, start_step + 4):
            time.sleep(0.2)
            report(metrics, step, metrics_of(step))
            if kept is None:  # the progress that the checkpoint of this step saves
                metrics.sync()
                kept = dataclasses.replace(metrics._progress)
        timing = metrics.summary(step, 9.0)["timing"]
        metrics.close()
        progress = kept
    seconds = [line["compute_seconds"] for line in lines(tmp_path)]
    assert len(seconds) == 3
    assert timing["tokens_per_second"] == pytest.approx(4 * TOKENS / sum(seconds[1:]))
    assert timing["goodput"] == pytest.approx(sum(seconds) / 10.8)
    assert lines(tmp_path)[-1]["goodput"] == timing["goodput"]


def test_when_lines_are_written(metrics, tmp_path):
    """A step is reported while the next step runs, and no step is reported after a lost lease."""

    def lost():
        raise ValueError("taken over")

    for step in (1, 2):
        metrics.step(
            step, metrics_of(step) | dict.fromkeys(("finite", "updated"), np.bool_(step == 1))
        )
        assert [line["step"] for line in lines(tmp_path)] == [*range(1, step)]
    metrics.flush()
    metrics._check = lost
    with pytest.raises(ValueError, match="taken over"):
        report(metrics, 3, metrics_of(3))
    with pytest.raises(ValueError, match="taken over"):
        metrics.validation(3, evaluation_of())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_run_that_is_lost_is_reported(metrics, tmp_path):
    nothing = np.full((LAYERS, EXPERTS), np.nan, np.float32)
    report(metrics, 1, metrics_of(1) | {"loss": np.float32(np.nan), "mean_score": nothing})
    metrics.validation(1, evaluation_of(np.nan, np.nan))
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[1]["validation_nll"] is None
    metrics.close()
    found = {tag for tag, _ in read_events(tmp_path)}
    assert "histograms/load/layer_0" in found and "histograms/mean_score/layer_0" not in found


def test_skipped_steps_in_a_row_end_the_run(metrics, caplog):
    """The number includes skipped steps before a restart, which are stored in the progress."""
    metrics._progress.skipped_in_row = 9
    for step, finite in ((4, True), (5, False), *((step, False) for step in range(6, 14))):
        report(
            metrics, step, metrics_of(step) | dict.fromkeys(("finite", "updated"), np.bool_(finite))
        )
    words = "step 5 skipped: loss 5, gradient norm 8; its batch has the sequences 16 to 19"
    assert words in caplog.text
    with pytest.raises(DivergedError, match=r"step 14: the last 10 updates.*train\.max_skipped=10"):
        report(metrics, 14, metrics_of(14) | dict.fromkeys(("finite", "updated"), np.bool_(False)))
    report(
        metrics, 15, metrics_of(15) | {"finite": np.bool_(True), "updated": np.bool_(False)}
    )  # is skipped, but does not count
    assert "step 15 skipped" in caplog.text and metrics._progress.skipped_in_row == 0


def test_free_places_do_not_count_in_the_load():
    load = np.array([[1.0, 0.0, 2.0, 0.0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    live = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.float32)
    figures = layer_metrics(metrics_of(1) | {"load": load, "live": live})
    np.testing.assert_allclose(figures["load_max_over_mean"], [2, 1])
    np.testing.assert_array_equal(figures["dead_experts"], [1, 0])
    np.testing.assert_array_equal(figures["live_experts"], [3, 4])
    assert load_spread(load[:1], live[:1]) == 2
    assert load_spread(load[:1], load[:1]) == 1  # only the experts of loads 1 and 2 are live
    assert load_spread(load[:1, [0, 2]], live[:1, [0, 3]]) == 1
    statistics = load_statistics(evaluation_of().stats._replace(load=load, live=live))
    assert statistics["dead_experts"] == 1 and statistics["live_experts"] == [3, 4]

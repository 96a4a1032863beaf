"""metrics.jsonl and TensorBoard files, read back without the writer."""

import json
import math
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from aoe_jax.evaluation.perplexity import Evaluation
from aoe_jax.training.telemetry import Telemetry

LAYERS, EXPERTS, TOKENS = 2, 4, 1000


def metrics_of(step, experts=EXPERTS):
    return {
        **{
            name: np.float32(step + i)
            for i, name in enumerate(("loss", "nll", "aux_loss", "grad_norm", "learning_rate"))
        },
        "load": np.full((LAYERS, experts), 2 / experts, np.float32),
        "load_entropy": np.array([1.0, 1.2], np.float32),
        "load_spread": np.float32(0.25),
        "confidence_entropy": np.array([0.5, 0.7], np.float32),
        "mean_score": np.linspace(0, 1, LAYERS * experts, dtype=np.float32).reshape(LAYERS, experts),
    }


def evaluation_of(nll, bits_per_byte, **sources):
    """Of a thousand tokens."""
    return Evaluation(1000 * nll, 1000, 1000 * nll / math.log(2) / bits_per_byte, None, sources)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Every `(tag, step)` with its scalar, or None for a histogram."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value if value.HasField("simple_value") else None
    return found


def test_lines_and_events_hold_the_metrics(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    telemetry.train(5, metrics_of(5))
    telemetry.evaluation(10, evaluation_of(3.5, 1.25))
    telemetry.close()
    train, validation = lines(tmp_path)
    assert train.pop("tokens_per_second") > 0
    assert train == pytest.approx(
        {
            "step": 5,
            "loss": 5,
            "nll": 6,
            "aux_loss": 7,
            "grad_norm": 8,
            "learning_rate": 9,
            "load_entropy": 1.1,
            "load_spread": 0.25,
            "confidence_entropy": 0.6,
            "experts_per_token": 2,
        }
    )
    assert validation == pytest.approx({"step": 10, "validation_nll": 3.5, "validation_bits_per_byte": 1.25})
    found = events(tmp_path)
    assert found["train/loss", 5] == 5 and found["train/load_spread", 5] == 0.25
    assert found["validation/nll", 10] == 3.5 and found["validation/bits_per_byte", 10] == 1.25
    assert all(("experts/mean_score/layer_" + str(layer), 5) in found for layer in range(LAYERS))


def test_sources_have_figures_of_their_own(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    telemetry.evaluation(10, evaluation_of(3.0, 2.0, books=evaluation_of(2.0, 1.0), news=evaluation_of(4.0, 3.0)))
    telemetry.close()
    figures = {
        "nll": 3,
        "bits_per_byte": 2,
        "nll/books": 2,
        "bits_per_byte/books": 1,
        "nll/news": 4,
        "bits_per_byte/news": 3,
    }
    assert lines(tmp_path) == [pytest.approx({"step": 10} | {f"validation_{name}": v for name, v in figures.items()})]
    found = events(tmp_path)
    assert {name: found[f"validation/{name}", 10] for name in figures} == pytest.approx(figures)


def test_dense_model_has_no_balance(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    telemetry.train(1, metrics_of(1, experts=1))
    telemetry.close()
    assert lines(tmp_path)[0].keys() == {
        *("step", "loss", "nll", "aux_loss", "grad_norm", "learning_rate", "tokens_per_second")
    }


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    for step in (2, 4, 6):
        telemetry.train(step, metrics_of(step))
    telemetry.evaluation(6, evaluation_of(3.0, 1.0))
    telemetry.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the half line of a killed run
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    telemetry = Telemetry(tmp_path, 5, 10, TOKENS)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == kept
    telemetry.train(6, metrics_of(60))
    telemetry.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == kept
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2), (4, 4), (6, 60)]


def test_lines_are_on_disk_at_once(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    telemetry.train(1, metrics_of(1))
    assert [line["step"] for line in lines(tmp_path)] == [1]
    telemetry.close()


def test_speed_is_per_step_and_without_evaluation(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    time.sleep(0.2)
    telemetry.train(4, metrics_of(4))
    time.sleep(0.5)
    telemetry.evaluation(4, evaluation_of(3.0, 1.0))
    time.sleep(0.1)
    telemetry.train(6, metrics_of(6))
    telemetry.close()
    first, _, second = lines(tmp_path)
    assert 0.25 < first["tokens_per_second"] / (TOKENS * 4 / 0.2) <= 1
    assert 0.25 < second["tokens_per_second"] / (TOKENS * 2 / 0.1) <= 1


def test_numbers_keep_their_precision(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10, TOKENS)
    telemetry.train(1, metrics_of(1) | {"nll": np.float32(math.pi)})
    telemetry.evaluation(1, evaluation_of(math.e, 1.0))
    telemetry.close()
    train, validation = lines(tmp_path)
    assert (
        np.float32(train["nll"]) == np.float32(math.pi)
        and validation["validation_nll"] == evaluation_of(math.e, 1.0).nll
    )

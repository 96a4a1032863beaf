"""Whole runs on two corpora: the results of each, evaluation, and two processes."""

import json
import re

import numpy as np
import pytest

from tests import runs
from tests.runs import mixture, succeed, train_command

pytestmark = pytest.mark.slow

FIGURES, SOURCES = ("nll", "bits_per_byte"), ("mine", "others")


def test_every_source_has_its_scores(tmp_path):
    workdir = tmp_path / "run"
    succeed(train_command(workdir, **mixture()))
    lines, validations = runs.read_metrics(workdir)
    assert lines[-1]["nll"] < lines[0]["nll"] - 1
    for line in validations:
        for name in FIGURES:
            low, high = sorted(line[f"validation_{name}/{source}"] for source in SOURCES)
            assert low < line[f"validation_{name}"] < high
    summary = json.loads((workdir / "summary.json").read_text())["metrics"]
    assert summary.items() >= runs.untimed(workdir)[1][-1].items()

    status, stdout, stderr = runs.run(["eval.py", f"--workdir={workdir}", "--split=validation"])
    assert status == 0, stderr
    report = json.loads((workdir / "eval.json").read_text())
    sources = report["sources"]
    assert tuple(sources) == SOURCES
    for name in FIGURES:
        found = {"": report[name]} | {f"/{source}": sources[source][name] for source in SOURCES}
        for source, value in found.items():
            expected = validations[-1][f"validation_{name}{source}"]
            np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert report["tokens"] == sum(result["tokens"] for result in sources.values())
    summed = sum(result["nll"] * result["tokens"] for result in sources.values())
    np.testing.assert_allclose(report["nll"], summed / report["tokens"], rtol=1e-9)
    for source, result in sources.items():
        scores = rf"{result['tokens']} tokens .*{result['nll']:.4f}.*{result['bits_per_byte']:.4f}"
        assert re.search(f"^{source}: {scores}", stdout, re.MULTILINE)

"""A whole run on two corpora: the results of each, and its evaluation."""

import json
import re
import shutil

import numpy as np
import pytest

from tests import runs
from tests.runs import corpus_store, succeed, train_command, write_texts

pytestmark = pytest.mark.slow

FIGURES, SOURCES = ("nll", "bits_per_byte"), ("mine", "others")


def test_every_source_has_its_scores(tmp_path):
    """The run has a document mask and a loss mask."""
    workdir = tmp_path / "run"
    store = shutil.copytree(corpus_store(), tmp_path / "mine")
    (tmp_path / "others").mkdir()
    other = write_texts(tmp_path / "others", count=20, seed=1)
    settings = {"data__name": f"prepared@{store}=0.75, text@{other}=0.25", "data__path": None}
    settings |= {"data__document_mask": True, "data__loss_mask": True}
    succeed(train_command(workdir, **settings))
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

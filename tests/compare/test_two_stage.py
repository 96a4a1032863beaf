"""The command of the two-stage classifier: what it prints, writes and refuses."""

import json

import numpy as np
import pytest

from tests.hasty import xla_flags
from tests.runs import finish, run, start


def test_command(tmp_path):
    file, folder = tmp_path / "new" / "figures.json", tmp_path / "pictures"
    flags = ["--seeds=2", "--steps=3", "--d_model=8", f"--json={file}", f"--output={folder}"]
    command = ["-m", "aoe_jax.compare.two_stage", *flags]
    status, stdout, stderr = finish(start(command, XLA_FLAGS=xla_flags()))
    assert status == 0, stderr
    result = json.loads(file.read_text())
    assert [result["setting"][name] for name in ("seeds", "steps", "d_model")] == [2, 3, 8]
    figures = {figure["arm"]: figure["stages"] for figure in result["figures"]}
    assert list(figures) == [
        "AoE, gate=chosen",
        "AoE, gate=all",
        "router, gate=chosen",
        "router, gate=all",
    ]
    for stage in (stage for stages in figures.values() for stage in stages):
        share = np.array(stage["share"])
        assert share.shape == (2, 3, 2) and np.allclose(share.sum(axis=-1), 1)
        assert (
            sum(stage["endings"].values()) == 2
            and min(stage["share_of_first_expert"]["mean"][:1]) >= 0.5
        )
    # Without a gradient a router chooses as it was drawn.
    first, second = figures["router, gate=chosen"]
    assert first["share"] == second["share"]
    lines = stdout.splitlines()
    assert len(lines) == 2 + 2 * len(figures) + len(result["endings"])
    assert all(line.startswith(arm) for line, arm in zip(lines[2:10:2], figures, strict=True))
    assert {path.name for path in folder.iterdir()} == {"two_stage.png", "two_stage.svg"}


@pytest.mark.parametrize(
    "flag, wanted",
    [
        ("--seeds=1", "--seeds=1: must be 2 or more"),
        ("--steps=0", "--steps=0: must be 1 or more"),
        ("--d_model=1", "--d_model=1: must be 2 or more"),
        ("--steps=few", "--steps=few: must be a whole number"),
        ("--json=.", "--json=.: is a folder; name a file"),
        (
            "--output=README.md/pictures",
            "--output=README.md/pictures: README.md/pictures can't be made",
        ),
    ],
)
def test_refused(flag, wanted):
    status, stdout, stderr = run(["-m", "aoe_jax.compare.two_stage", flag])
    assert status == 2 and not stdout
    assert stderr.startswith("error: ") and wanted in stderr and len(stderr.splitlines()) == 1

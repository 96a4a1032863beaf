"""The commands of docs/start_run.md, one after the other, with the miniature of configs/1b.py."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT, finish, scratch, start

PAGE = (ROOT / "docs/start_run.md").read_text()
WORDS = "the state of the union and its people, of work and of peace, in the year that begins now"
PYTHON = re.compile(r"    (python .*)")


def commands(folder):
    """The page's Python commands, with small sizes and the paths of `folder`."""
    (folder / "texts").mkdir()
    lines = [f'{{"text": "{i} {WORDS[i % 30 :]} {WORDS} {i * 7919}"}}\n' for i in range(600)]
    (folder / "texts/part.jsonl").write_text("".join(lines))
    changes = {
        "configs/1b.py": "configs/1b.py:mini",
        "bpe:32000": "bpe:512 --validation=0.1 --test=0.1",
        "/data/": f"{folder}/",
        "/shared/": f"{folder}/shared/",
        "1b.png": f"{folder}/1b.png",
        "python -m aoe_jax.doctor": "python -m aoe_jax.doctor --config=configs/1b.py:mini",
    }
    for line in PYTHON.findall(PAGE):
        for old, new in changes.items():
            line = line.replace(old, new)
        yield shlex.split(line)[1:]


@pytest.mark.slow
def test_the_road_runs_from_top_to_bottom():
    folder = scratch("start_run")
    for command in commands(folder):
        status, output, stderr = finish(start(command))
        assert status == 0, (command, stderr)
    assert (folder / "shared/models/1b/README.md").exists() and (folder / "1b.png").exists()
    assert "nll" in output + stderr


@pytest.mark.parametrize("script", sorted((ROOT / "examples/launch").glob("*.s*")), ids=str)
def test_launch_scripts(script):
    """Bash parses them, and they start programs and configurations that exist."""
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "aoe_jax.supervise -- train.py --config=configs/1b.py" in text
    assert script.name in PAGE and Path(script).stat().st_mode & 0o100

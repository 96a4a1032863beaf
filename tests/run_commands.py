"""Runs the cheap commands of README and the documentation as they are written there:

    python -m tests.run_commands

in a folder with runs of 20 steps, which replace the runs that the pages train. It prints the exit
status of each command; its own exit status is 1 if a command failed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.command_lines import commands_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CHEAP = (
    "eval.py",
    "aoe_jax.convert",
    "aoe_jax.export",
    "aoe_jax.generate",
    "aoe_jax.prune",
)
# Arguments with a placeholder, with data that the repository lacks, or with parts left out.
ELSEWHERE = re.compile(r"=[A-Z]+\b|/my/|=arc_easy|task:|gs://|\.\.\.")
AS_THEY_ARE = (
    ("aoe_jax", ""),
    ("train.py", "--config=configs/tiny.py --workdir=runs/trial --config.train.steps=20"),
    ("aoe_jax.compare", "--workdir=results/small --arms=aoe_d3_free,moe_free"),
)
PREPARATION = [
    ("train.py", "--config=configs/tiny.py --workdir=runs/tiny --config.train.steps=20"),
    ("train.py", "--config=configs/tiny.py:moe --workdir=runs/moe --config.train.steps=20"),
    ("train.py", "--config=configs/tiny.py:dense --workdir=runs/dense --config.train.steps=20"),
    ("aoe_jax.export", "--workdir=runs/dense --output=models/llama"),
]


def is_cheap(program, arguments):
    """Whether a command needs about a minute; a program without any flag is no command."""
    is_whole = "--" in arguments and not ELSEWHERE.search(arguments)
    return (program, arguments) in AS_THEY_ARE or (program in CHEAP and is_whole)


def commands():
    """Lists the different `(program, arguments)` in the order of the pages."""
    found = [command for page in PAGES for command in commands_of(page.read_text())]
    return list(dict.fromkeys(command for command in found if is_cheap(*command)))


def run(folder, program, arguments):
    """Whether a command ends with status 0 in `folder`."""
    for output in re.findall(r"--output=(\S+)", arguments):  # another page may have made it
        shutil.rmtree(folder / output, ignore_errors=True)
    module = [program] if program.endswith(".py") else ["-m", program]
    command = [sys.executable, *module, *shlex.split(arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    print(done.returncode, program, arguments, flush=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("train.py", "eval.py", "configs", "results"):
            (folder / name).symlink_to(ROOT / name)
        ended_well = [run(folder, *command) for command in [*PREPARATION, *commands()]]
    sys.exit(not all(ended_well))


if __name__ == "__main__":
    main()

"""The console commands of a wheel, their list and their help."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aoe_jax.__main__ import commands
from tests.forking import ENVIRONMENT
from tests.hasty import xla_flags
from tests.in_process import execute
from tests.runs import corpus_folder
from tests.test_imports import ROOT

MODULES = [module for _, module, _ in commands()]
PACKAGE_FILES = {"commands.ini", "py.typed", "h100.txtpb", "report.md.j2", "modeling_aoe.py"}
CONFIG = """
from aoe_jax.storage.config_files import default_config
from sizes import WIDTH

def get_config():
    config = default_config()
    config.model.update(n_layers=1, n_heads=2, d_model=WIDTH, vocab_size=300, max_len=32)
    config.experts.update(n_experts=4, top_k=2, d_ffn=32, d_low=8)
    config.data.update(name="text", path={texts!r}, cache={cache!r}, seq_len=32)
    config.train.update(steps=2, batch_size=2, warmup=0.5, log_every=1)
    return config
"""


def test_the_list_has_every_command_with_one_line():
    status, stdout, stderr = execute(["-m", "aoe_jax"])
    assert status == 0, stderr
    lines = stdout.splitlines()
    assert all(len(line) <= 110 for line in lines)
    for script, module, about in commands():
        assert any(re.fullmatch(rf"{script} +{module} +{re.escape(about)}", line) for line in lines)
    has_command = re.compile(r"^(command = |def command\(\))", re.MULTILINE)
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in ROOT.glob("aoe_jax/**/*.py")
        if has_command.search(path.read_text())
    }
    assert found == set(MODULES)


def test_the_list_takes_no_arguments():
    status, stdout, stderr = execute(["-m", "aoe_jax", "train"])
    assert (status, stdout) == (2, "") and "unexpected argument 'train'" in stderr


@pytest.mark.parametrize("module", MODULES)
def test_help_is_short(module):
    status, stdout, stderr = execute(["-m", module, "--help"])
    assert status == 0, stderr
    about = next(about for _, name, about in commands() if name == module)
    assert stdout.startswith(f"{about}\n\n    python ")
    lines = stdout.splitlines()
    assert len(lines) <= 55 and all(len(line) <= 100 for line in lines)
    flags = re.findall(r"^  --([\w-]+)", stdout, re.MULTILINE)
    assert {"debug", "retry_seconds"} < set(flags) and len(flags) == len(set(flags))
    assert ("coordinator" in flags) == ("distributed.start()" in source_of(module))
    assert ("config" in flags) == ("--config.GROUP.FIELD" in stdout)


def test_help_of_a_benchmark():
    status, stdout, stderr = execute(["-m", "benchmarks.plans", "--help"])
    assert status == 0, stderr
    assert stdout.startswith("The table of plans") and "--rows " in stdout


def source_of(module):
    file = ROOT.joinpath(*module.split("."))
    return (file / "__main__.py" if file.is_dir() else file.with_suffix(".py")).read_text()


def test_help_names_the_defaults():
    status, stdout, _ = execute(["-m", "aoe_jax.prune", "-h"])
    assert status == 0
    text = " ".join(stdout.split())
    assert "--seed seed of the tokens, of k-means and of a new router (default: 0)" in text
    assert "--method <uncurl|frequency_merge|greedy>: how" in text


@pytest.mark.slow
def test_a_wheel_trains_in_any_folder(tmp_path):
    """With a configuration of one's own, that imports a file beside it."""
    source, installed, own = tmp_path / "source", tmp_path / "installed", tmp_path / "own"
    source.mkdir()
    own.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "aoe_jax", source / "aoe_jax", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", f"--target={installed}"]
    subprocess.run([*pip, "install", *options, str(source)], check=True)
    files = {path.relative_to(installed) for path in installed.glob("aoe_jax/**/*")}
    tracked = {path.relative_to(source) for path in source.glob("aoe_jax/**/*")}
    assert {path for path in files if "__pycache__" not in path.parts} == tracked
    assert {path.name for path in files} > PACKAGE_FILES
    assert {path.name for path in (installed / "bin").glob("aoe-*")} == {
        script for script, _, _ in commands()
    }

    (own / "sizes.py").write_text("WIDTH = 16\n")
    content = CONFIG.format(texts=str(corpus_folder()), cache=str(tmp_path / "cache"))
    (own / "mine.py").write_text(content)
    status, stdout, stderr = run_installed(installed, own, "aoe-train", "--help")
    assert status == 0 and "--workdir" in stdout, stderr
    command = "aoe-train", "--config=mine.py", "--workdir=run"
    status, stdout, stderr = run_installed(installed, own, *command)
    assert status == 0, stderr
    assert stdout.startswith("result    step 2, 128 tokens, validation nll ")
    assert "aoe_jax.eval" in stdout and "configs/" not in stdout  # a wheel has no configs
    assert (own / "run" / "training.png").exists()
    status, stdout, stderr = run_installed(installed, own, "aoe-doctor")
    assert (status, stdout) == (2, "") and stderr.startswith("error: --config is missing")


def run_installed(installed: Path, folder, name, *arguments):
    """Runs a console script from another folder: `(status, stdout, stderr)`."""
    done = subprocess.run(
        [str(installed / "bin" / name), *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(installed), "XLA_FLAGS": xla_flags()},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr

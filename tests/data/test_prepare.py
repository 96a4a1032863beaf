"""The command that makes token stores, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.texts import LLAMA, json_lines, texts
from tests.in_process import execute
from tests.runs import ROOT, contents, corpus_store, run, start, train_command, wait_for

FLAGS = ["--tokenizer=bpe:300", "--validation=0.05", "--test=0.05"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of 9 MB in all, three units of work."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(2):
        (folder / f"{i}.jsonl").write_bytes(json_lines(texts(8600, i, longest=140)))
    return folder


def finish(*flags):
    """`(exit status, stderr)`."""
    status, _, stderr = run(["-m", "aoe_jax.prepare", *map(str, flags)])
    return status, stderr


def flags_of(folder, output):
    return [f"--input={folder}/*.jsonl", *FLAGS, f"--output={output}", "--processes=1"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("stores") / "store"
    status, stderr = finish(*flags_of(folder, output))
    assert status == 0, stderr
    lines = stderr.splitlines()
    assert any("preparing: 100%" in line for line in lines)
    assert lines[-1].endswith(
        f"train on it with --config.data.name=prepared --config.data.path={output}"
    )
    return output


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(folder, whole, tmp_path):
    """The worker processes end with the command, and the same command completes the store."""
    output = tmp_path / "store"
    process = start(["-m", "aoe_jax.prepare", *flags_of(folder, output)], forked=False)
    wait_for(process, lambda: list((output / "units").glob("*.json")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    wait_for(None, lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
    status, stderr = finish(*flags_of(folder, output))
    assert children and status == 0 and "of 3 units of work are done" in stderr, stderr
    assert contents(output) == contents(whole)


@pytest.mark.slow
def test_long_document_takes_bounded_memory(tmp_path):
    """Given the whole text, a tokenizer library needs up to a hundred times the text's memory."""
    (tmp_path / "many.jsonl").write_bytes(json_lines(texts(300)))
    (tmp_path / "long.txt").write_text("the state of the Union, 1790 " * 700_000)
    flags = [f"--input={tmp_path}/*.*", *FLAGS, f"--output={tmp_path / 'store'}", "--processes=1"]
    code = (
        "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:]);"
        "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-m", "aoe_jax.prepare", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    status, kilobytes = map(int, done.stdout.split())
    assert status == 0 and kilobytes < 700_000, (done.stdout, done.stderr)


def test_check(tmp_path):
    store = shutil.copytree(corpus_store(), tmp_path / "store")
    command = ["-m", "aoe_jax.prepare", "--check", f"--output={store}"]
    status, _, stderr = execute(command)
    assert status == 0 and stderr.endswith("all shards are as they were written\n")
    shard = next(store.glob("train*"))
    shard.unlink()
    status, _, stderr = execute(command)
    wanted = f"damaged shards: {shard.name}; prepare the input again, into a new"
    assert status == 2 and wanted in stderr


def test_no_jax_is_needed():
    code = "import sys, aoe_jax.prepare; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "aoe_jax.data.preparation" in modules
    assert not {"jax", "flax", "grain", "tensorflow_datasets"} & {*modules}


@pytest.mark.slow
def test_training_on_a_store_of_a_sentencepiece_model(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines(texts(60, 0, longest=140)))
    output = tmp_path / "store"
    given = [f"--input={tmp_path}/texts.jsonl", f"--tokenizer={LLAMA}", f"--output={output}"]
    status, stderr = finish(*given, *FLAGS[1:])
    assert status == 0, stderr
    store = {"data__name": "prepared", "data__path": output, "train__steps": 2}
    store |= {"model__n_layers": 1, "model__d_model": 16, "train__eval_every": 0}
    status, _, stderr = run(train_command(tmp_path / "run", **store, model__vocab_size=32000))
    assert status == 0, stderr
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == LLAMA.read_bytes()
    status, _, stderr = run(["eval.py", f"--workdir={tmp_path / 'run'}", "--split=validation"])
    assert status == 0, stderr
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["bits_per_byte"] > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--input=x", "--output is missing; name the directory of the token store"),
        ("--output=x --tokenizer=bpe:300", "--input is missing; name a folder, or a glob pattern"),
        ("--output=x --input=README.md", "--tokenizer is missing; name a Hugging Face tokenizer"),
        ("--output=x --input=none* --tokenizer=bpe:300", "--input='none*': matches no file"),
        ("--output=x --input=aoe_jax --tokenizer=bpe:300", "--input='aoe_jax': has no documents"),
        ("--output=x --input=README.md --tokenizer=bpe:300", "README.md is in no known format"),
        ("--output=x --input=README.md --tokenizer=bpe:3", "--tokenizer='bpe:3': give bpe:N"),
        ("--output=x --processes=0", "--processes=0"),
        (
            "--output=x --check",
            "store 'x': there is no such folder; correct config.data.path or --out",
        ),
        ("--output=x --check --input=y", "--check takes --output alone; leave out --input"),
    ],
)
def test_mistakes(given, message):
    status, _, stderr = execute(["-m", "aoe_jax.prepare", *given.split()])
    assert status == 2 and message in stderr and "Traceback" not in stderr, stderr
    assert not (ROOT / "x").exists()

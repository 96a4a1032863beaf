"""Measures the speed of data preparation on one core, and compares it with the tokenizer library
alone. Also tests whether a preparation of gigabytes of text can be continued after it was killed.

`python -m benchmarks.prepare [--repeats=5] [--json=FILE]` times two functions in turn for each
tokenizer: the work of a preparation process (read and parse JSON lines, hash, tokenise, write, hash
again), and the library's encoding of the same texts. Speeds are in MB of text per second.

`python -m benchmarks.prepare --workdir=DIR --size=2e9 [--json=FILE]` writes JSON lines with 2e9
bytes of text into DIR and prepares them twice: without a break, and with two kills and restarts.
Then it compares the two stores and reads both completely. The printed memory is the largest sum of
the proportional set sizes (PSS) of all processes.
"""

import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from absl import flags

from aoe_jax.data.corpora import speech_files
from aoe_jax.data.documents import find_files
from aoe_jax.data.plan_file import make_plan
from aoe_jax.data.preparation import Settings, check, install_tokenizer, write_unit
from aoe_jax.data.token_store import read_manifest, saved_tokenizer
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.storage.files import write_json
from benchmarks.timing import new_workdir, report, run_benchmark, times

DOCUMENT_CHARACTERS = 4000
KILLS = 2  # number of kills during the preparation of --workdir

_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls of each function", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer(
    "documents", None, "how many documents are timed; by default all", lower_bound=1
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32000, "vocabulary size of BPE", lower_bound=257)
_WORKDIR = flags.DEFINE_string("workdir", None, "a new directory for the large preparation")
_SIZE = flags.DEFINE_float("size", 2e9, "bytes of text for --workdir", lower_bound=1e7)
_PROCESSES = flags.DEFINE_integer(
    "processes", len(os.sched_getaffinity(0)), "processes that prepare --workdir", lower_bound=1
)


def texts():
    """Yields the texts of the embedded corpus, cut into documents."""
    for file in speech_files():
        text = file.read_text()
        for start in range(0, len(text), DOCUMENT_CHARACTERS):
            yield text[start : start + DOCUMENT_CHARACTERS]


def llama_model():
    """Returns the path of the SentencePiece model of 32,000 pieces in the package mistral-common.
    Raises `UserError` if the package is not installed.
    """
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        raise UserError(
            "the package mistral-common is not installed; run `pip install mistral-common`"
        )
    return Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")


def rates(repeats, vocab_size, count):
    """Times preparation and the library alone on one core; returns a list with a dict for each."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    figures, documents = [], list(itertools.islice(texts(), count))
    size = sum(len(text.encode()) for text in documents)
    with tempfile.TemporaryDirectory() as root:
        file = Path(root, "texts.jsonl")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        for name, tokenizer in {
            f"bpe:{vocab_size}": f"bpe:{vocab_size}",
            "SentencePiece": str(llama_model()),
        }.items():
            output = Path(root, name.replace(":", "-"))
            (output / "units").mkdir(parents=True)
            settings = Settings(tokenizer, validation=0.005, test=0.005)
            plan = make_plan(find_files([str(file)], output), settings.as_planned())
            units = range(len(plan["units"]))
            write_json(output / "plan.json", plan)
            install_tokenizer(output, plan, settings)
            encode = load_tokenizer(saved_tokenizer(output), threads=1).encode
            arms = {
                "prepare": lambda output=output, units=units: [
                    write_unit(output, unit) for unit in units
                ],
                "library": lambda encode=encode: encode(documents),
            }
            seconds = times(arms, repeats)
            ratio = statistics.median(
                library / prepare
                for library, prepare in zip(seconds["library"], seconds["prepare"], strict=True)
            )
            figure = {arm: size / statistics.median(found) / 1e6 for arm, found in seconds.items()}
            figures.append(
                {"tokenizer": name, "mb_per_second": figure, "prepare_to_library": ratio}
            )
            print(
                f"{name:>14}: {figure['prepare']:.1f} MB of text per second, the library alone "
                f"{figure['library']:.1f}; {ratio:.2f}x the library's speed"
            )
    return figures


def write_texts(folder: Path, size):
    """Writes JSON lines into files of about 64 MB; all documents differ, because each begins with
    its own number. Returns the number of documents.
    """
    sources, written, count, number = list(texts()), 0, 0, 0
    while written < size:
        with open(folder / f"{number:04d}.jsonl", "w") as file:
            while written < size and file.tell() < 64e6:
                text = f"{count}. {sources[count % len(sources)]}"
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                count += 1
        number += 1
    return count


def watched(command, output: Path, stop_at=None):
    """Runs a command; if `stop_at` is not None, kills it after `stop_at` units of work.
    Returns `(exit status, seconds, largest memory in bytes)`.
    """
    started, largest = time.monotonic(), 0
    process = subprocess.Popen([*command, f"--output={output}"])
    while process.poll() is None:
        largest = max(largest, memory(process.pid))
        if stop_at is not None and len(list((output / "units").glob("*.json"))) >= stop_at:
            process.kill()
        time.sleep(0.2)
    return process.returncode, time.monotonic() - started, largest


def memory(pid):
    """Returns the PSS of a process and its children, in bytes."""
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # the process has just ended
        pass
    return total


def large(root: Path, size, processes):
    """Prepares `size` bytes of text twice, the second time with kills; returns the figures."""
    (root / "texts").mkdir(parents=True)
    count = write_texts(root / "texts", size)
    command = [sys.executable, "-m", "aoe_jax.prepare", f"--input={root}/texts/*.jsonl"]
    command += [f"--tokenizer=bpe:{_VOCAB_SIZE.value}", f"--processes={processes}"]
    whole, killed = root / "whole" / "store", root / "killed" / "store"
    status, seconds, largest = watched(command, whole)
    if status:
        raise UserError(f"the preparation ended with status {status}")
    units = len(json.loads((whole / "plan.json").read_text())["units"])
    for kill in range(1, KILLS + 1):
        status, _, held = watched(command, killed, units * kill // (KILLS + 1))
        largest = max(largest, held)
        if status != -signal.SIGKILL:
            raise UserError(f"the preparation ended with status {status} before it was killed")
    status, _, held = watched(command, killed)
    manifests = [read_manifest(store) for store in (whole, killed)]
    found = sum(split["documents"] for split in manifests[0]["splits"].values())
    if status or found != count or manifests[0] != manifests[1] or check(whole) or check(killed):
        raise UserError(f"{killed} differs from {whole}, or lacks some of the {count} documents")
    text = sum(split["bytes"] for split in manifests[0]["splits"].values())
    print(
        f"{text / 1e9:.2f} GB of text, {count} documents, {units} units of work, "
        f"{processes} processes: {seconds:.0f} s, {text / seconds / 1e6:.1f} MB of text a second; "
        f"at most {max(largest, held) / 1e6:.0f} MB of memory. "
        f"Killed {KILLS} times, it ended with the same shards, and all {found} documents"
    )
    return [
        {
            "text_bytes": text,
            "documents": count,
            "units": units,
            "processes": processes,
            "seconds": seconds,
            "largest_memory_bytes": max(largest, held),
        }
    ]


def main():
    if _WORKDIR.value is None:
        report(rates(_REPEATS.value, _VOCAB_SIZE.value, _DOCUMENTS.value))
        return
    report(large(new_workdir(_WORKDIR), _SIZE.value, _PROCESSES.value))


if __name__ == "__main__":
    run_benchmark(main)

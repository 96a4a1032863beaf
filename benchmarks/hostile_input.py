"""Peak memory of preparations of hostile and of huge input, each beside its limit.

`python -m benchmarks.hostile_input [--cases=NAME,...] [--json=FILE]`: each case makes its input in
a temporary folder and prepares it in processes of their own. Memory is the largest resident set of
one of these processes, by the kernel, and at least that of this program (0.2 GB). The exit status
is 1 if a case uses more than its limit, or ends with another status than it should.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from aoe_jax.data.sotu import speech_files
from benchmarks.timing import check_names, report, run_benchmark

_PREPARE = ["-m", "aoe_jax.prepare", "--input={here}/in/*", "--output={here}/out"]
_PREPARE += ["--validation=0.2", "--test=0.2", "--processes=2", "--tokenizer=bpe:1000"]
_OPEN = """
from aoe_jax.config.data import DataConfig
from aoe_jax.data.tokenised import open_corpus
open_corpus(DataConfig("{name}", path="{{here}}/in", cache="{{here}}/out"), 1000)
"""


def long_document(folder: Path):
    """Writes a document of 300 MB, the addresses with numbers between them, and 30 short ones."""
    small_files(folder, 30)
    speeches = [file.read_text() for file in speech_files()]
    with open(folder / "long.txt", "w") as file:
        while file.tell() < 300e6:
            file.write(f"{file.tell()} {speeches[file.tell() % len(speeches)]}\n")


def tfds_data_set(folder: Path):
    """Writes the same documents as a TFDS data set, `long_documents`."""
    import tensorflow_datasets as tfds

    class LongDocuments(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for file in sorted(texts.iterdir()):
                yield file.name, {"text": file.read_text()}

    with tempfile.TemporaryDirectory() as made:
        long_document(texts := Path(made))
        LongDocuments(data_dir=folder, file_format="array_record").download_and_prepare()


def gzip_bomb(folder: Path):
    """Writes 10 GB of lines of JSON into a file of 10 MB."""
    line = json.dumps({"text": "a " * 2**19}).encode() + b"\n"
    member = gzip.compress(line * 64)
    with open(folder / "bomb.jsonl.gz", "wb") as file:
        for _ in range(10**10 // (64 * len(line)) + 1):
            file.write(member)


def long_line(folder: Path):
    """Writes a line of 10 GB as a sparse file."""
    with open(folder / "line.jsonl", "wb") as file:
        file.write(b'{"text": "')
        file.truncate(10**10)


def small_files(folder: Path, count=100_000):
    """Writes `count` documents of a few words, each in a file."""
    for number in range(count):
        (folder / f"{number:06d}.txt").write_text(f"Document {number} of the union.")


class Case(NamedTuple):
    """A preparation."""

    about: str
    write: Callable[[Path], object]
    command: list[str]
    bar_mb: int
    status: int


CASES = {
    "bpe": Case("300 MB document, --tokenizer=bpe:1000", long_document, _PREPARE, 2500, 0),
    "text": Case(
        "the same, data.name=text", long_document, ["-c", _OPEN.format(name="text")], 2500, 0
    ),
    "tfds": Case(
        "the same as a TFDS data set",
        tfds_data_set,
        ["-c", _OPEN.format(name="long_documents")],
        2500,
        0,
    ),
    "bomb": Case("gzip bomb of 10 GB", gzip_bomb, _PREPARE, 500, 2),
    "line": Case("line of 10 GB", long_line, _PREPARE, 1500, 2),
    "files": Case("100,000 files", small_files, _PREPARE, 500, 0),
}


def measure(case: Case):
    """Prepares the input of a case: `(exit status, peak in MB, seconds, last line of stderr)`."""
    with tempfile.TemporaryDirectory() as here:
        Path(here, "in").mkdir()
        case.write(Path(here, "in"))
        started = time.monotonic()
        command = [sys.executable, *(word.format(here=here) for word in case.command)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            stderr = process.stderr.read().replace(here, "DIR")
            _, status, usage = os.wait4(process.pid, 0)  # the largest of it and of its children
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds, last_line = time.monotonic() - started, (stderr.strip().splitlines() or [""])[-1]
        return process.returncode, usage.ru_maxrss * 1024 / 1e6, seconds, last_line


def main():
    figures = []
    names = flags.FLAGS.cases
    check_names("cases", names, CASES)
    for name in names:
        case = CASES[name]
        status, peak, seconds, last_line = measure(case)
        holds = peak <= case.bar_mb and status == case.status
        print(
            f"{case.about}: {peak:.0f} MB, limit {case.bar_mb} MB; exit status {status}, should be "
            f"{case.status}; {seconds:.0f} s{'' if holds else '; FAILS'}\n    {last_line}",
            flush=True,
        )
        figures.append({"case": name, "peak_mb": peak, "bar_mb": case.bar_mb, "status": status})
        figures[-1] |= {"seconds": seconds, "holds": holds, "last_line": last_line}
    report(figures)
    return int(not all(figure["holds"] for figure in figures))


if __name__ == "__main__":  # only here, so that tests can import this beside other commands
    flags.DEFINE_list("cases", list(CASES), "which cases")
    run_benchmark(main)

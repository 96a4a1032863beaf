"""Measures how long a training step of configs/tiny.py waits for its batch from several corpora,
with and without prefetching.

`python -m benchmarks.input [--data=NAME] [--cache=DIR] [--steps=60] [--json=FILE]`. NAME is written
like the field `data.name`. By default, half of the tokens come from the embedded corpus and half
from the long descriptions of the installed Python packages. The corpora are tokenised before the
measurement; batches are packed and shuffled during it.

Steps with and without prefetching alternate. A wait is the time of `next(data)` and of copying the
batch to the device, measured after the step has ended. In a training run the device computes a step
during this time, so the measured wait is an upper bound of the time that a run loses.
"""

import importlib.metadata
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import grain
import jax
from absl import flags

from aoe_jax.config.data import DataConfig
from aoe_jax.data.pipeline import READ_OPTIONS, train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch
from aoe_jax.training.step import init_state, make_train_step
from benchmarks.timing import configuration, machine_in_words, report, run_benchmark

ARMS = {
    "reading ahead": READ_OPTIONS,
    "without": grain.ReadOptions(num_threads=0, prefetch_buffer_size=0),
}
WARM_UP = 2  # first steps of each arm, which are not measured

_DATA = flags.DEFINE_string("data", None, "other corpora, written like the field data.name")
_STEPS = flags.DEFINE_integer("steps", 60, "timed steps of each arm", lower_bound=1)
_CACHE = flags.DEFINE_string("cache", DataConfig.cache, "a folder for the token stores")


def write_descriptions(folder: Path):
    """Writes a file with the long description of every installed package that has one."""
    for package in importlib.metadata.distributions():
        text = package.metadata.get_payload()
        if text and text.strip():
            (folder / f"{package.name}.txt").write_text(text)


def waits(step, state, iterators, put, n_steps):
    """Returns `{arm: (seconds of each step, seconds of the wait after each step)}`."""
    batches = {arm: put(next(iterator)) for arm, iterator in iterators.items()}
    seconds = {arm: ([], []) for arm in iterators}
    for _ in range(WARM_UP + n_steps):
        for arm, iterator in iterators.items():
            started = time.perf_counter()
            state, metrics = step(state, batches[arm])
            jax.block_until_ready((state, metrics))
            ended = time.perf_counter()
            batches[arm] = jax.block_until_ready(put(next(iterator)))
            seconds[arm][0].append(ended - started)
            seconds[arm][1].append(time.perf_counter() - ended)
    return {arm: (steps[WARM_UP:], waited[WARM_UP:]) for arm, (steps, waited) in seconds.items()}


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
    train = config.train
    iterators = {
        arm: iter(
            train_batches(
                corpus.train,
                corpus.weights,
                config.data.seq_len,
                train.batch_size,
                train.seed,
                read_options=options,
            )
        )
        for arm, options in ARMS.items()
    }
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config, train.seed))()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        seconds = waits(
            step, state, iterators, partial(put_batch, batch_sharding(mesh)), _STEPS.value
        )
    figures = []
    for arm, (steps, waited) in seconds.items():
        shares = [wait / (wait + step) for step, wait in zip(steps, waited, strict=True)]
        figure = {
            "arm": arm,
            "tokens": {name: len(store) for name, store in corpus.train.items()},
            "step_ms": 1e3 * statistics.median(steps),
            "wait_ms": 1e3 * statistics.median(waited),
            "share": statistics.median(shares),
            "largest_share": max(shares),
        }
        figures.append(figure)
        print(
            f"{arm:>13}: step {figure['step_ms']:.0f} ms, then {figure['wait_ms']:.2f} ms for the "
            f"next batch: {100 * figure['share']:.2f}% of the time, "
            f"at most {100 * figure['largest_share']:.2f}%"
        )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)

"""Measures the step times of several arms (configurations), alternately in one process.

In each round every arm in turn does a few steps on its batch, because times of separate runs on a
shared machine are hard to compare. Times are processor time on CPU, elsewhere wall-clock time.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config.run import Config
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.devices import program_memory
from aoe_jax.training.step import new_state, train_step_on

ROUNDS = 10
STEPS = 3  # per arm and round; the first is not timed, because it fills the processor's caches


def random_batch(config: Config):
    """A global batch of random tokens, as NumPy arrays."""
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, *shape), np.int32)
    batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": np.ones(shape, np.int32)}
    return batch | {"weights": np.ones(shape, np.float32)}


class RepeatedStep:
    """Each call does one more training step on the same batch and returns its metrics.

    `program` is the compiled step, and `memory` the result of `program_memory` for it.
    """

    def __init__(self, config: Config, batch=None, folder: Path | None = None):
        """Compiles the step for all devices of all processes, on the mesh of the configuration.

        `batch` defaults to random tokens. The state comes from the newest checkpoint in `folder`,
        or is random if `folder` is None. Raises `UserError` if there is no checkpoint.
        """
        config = fill_mesh(config, jax.device_count())
        self._mesh = make_mesh(config, jax.devices())
        with jax.set_mesh(self._mesh):
            batch = random_batch(config) if batch is None else batch
            self._batch = put_batch(batch_sharding(self._mesh), batch)
            step, like = train_step_on(self._mesh, config)
            if folder:
                checkpoints = Checkpoints(folder)
                self._state, *_ = checkpoints.restore(checkpoints.find("newest"), like)
            else:
                self._state = new_state(config, like)
            # This is fast if the compilation cache has the program from training on this machine.
            self.program = step.lower(self._state, self._batch).compile()
        self.memory = program_memory(self._state, self.program)

    def __call__(self):
        with jax.set_mesh(self._mesh):
            self._state, metrics = self.program(self._state, self._batch)
        return metrics


def seconds_in_turn(steps: Mapping[str, Callable], rounds=ROUNDS):
    """Returns `{name: median seconds of a call}`; `steps` maps names to functions to call."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for number in range(STEPS):
                started = clock()
                jax.block_until_ready(step())
                if number:
                    seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}

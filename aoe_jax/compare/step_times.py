"""Training steps, each repeated on one batch, and how long they take, several in turn in one
process.

Runs that are trained at the same time, or on a machine that others use too, say little of each
other's speed. Here every arm takes a few steps, then the next one, round by round; on CPU,
processor seconds are counted.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from aoe_jax.compare.routing import validation_batches
from aoe_jax.config import Config
from aoe_jax.json_files import write_json
from aoe_jax.sharding import (
    batch_sharding,
    fill_mesh,
    make_mesh,
    put_batch,
    replicated,
    state_shardings,
    with_shardings,
)
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.memory import program_memory
from aoe_jax.training.step import init_state, make_train_step

log = logging.getLogger(__name__)

ROUNDS, STEPS = (
    10,
    3,
)  # the first step of a round isn't counted: caches are still those of another arm


def random_batch(config: Config):
    """A batch of random tokens, on the host."""
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, *shape), np.int32)
    ones = np.ones(shape, np.int32)
    return {
        "inputs": tokens[0],
        "targets": tokens[1],
        "segment_ids": ones,
        "weights": ones.astype(np.float32),
    }


class RepeatedStep:
    """A training step on one batch, again and again: a function that takes it and returns its
    metrics.
    """

    def __init__(self, config: Config, folder: Path | None = None):
        """Compiles for all devices, of all processes, on the mesh of the configuration.

        Args:
          config: of the model and its training.
          folder: of a run of it, which goes on from its newest checkpoint, on its first validation
            batch and at the learning rate that it has come down to; None: parameters are drawn, and
            the tokens as well.

        Raises:
          UserError: the run can't be read.
        """
        config = fill_mesh(config, jax.device_count())
        batch = (
            next(validation_batches(folder, config, config.train.batch_size))
            if folder
            else random_batch(config)
        )
        self._mesh = make_mesh(config, jax.devices())

        def new_state():
            return init_state(config, config.train.seed)

        with jax.set_mesh(self._mesh):
            self._batch = put_batch(batch_sharding(self._mesh), batch)
            abstract = jax.eval_shape(new_state)
            shardings = state_shardings(self._mesh, abstract)
            if not folder:
                self._state = jax.jit(new_state, out_shardings=shardings)()
            else:
                checkpoints = Checkpoints(folder)
                self._state, *_ = checkpoints.restore(
                    checkpoints.find("newest"), with_shardings(abstract, shardings)
                )
            # The very program of a training run, which the compilation cache may have.
            step = jax.jit(
                make_train_step(config),
                donate_argnums=0,
                out_shardings=(shardings, replicated(self._mesh)),
            )
            self.program = step.lower(self._state, self._batch).compile()
        self.memory = program_memory(self._state, self.program)  # of a device, in bytes

    def __call__(self):
        """Takes a step."""
        with jax.set_mesh(self._mesh):
            self._state, metrics = self.program(self._state, self._batch)
        return metrics


def seconds_in_turn(steps: Mapping[str, Callable], rounds=ROUNDS):
    """The median seconds of each of several steps, functions of nothing that return arrays."""
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


def time_steps(trained: Mapping[str, tuple[Config, Path]], output: Path):
    """Writes the median seconds of a step of trained models to a JSON file.

    Args:
      trained: arm -> the configuration of a run and its directory; all must fit the devices
        together.
      output: the file; it has `trained`, the configurations, `seconds` and `failed`, why an arm
        can't be timed, all by arm.

    Returns:
      The seconds and the failures.
    """
    steps, failed = {}, {}
    for arm, (config, folder) in trained.items():
        try:
            steps[arm] = RepeatedStep(config, folder)
        except Exception as e:  # such as a damaged checkpoint; the others are timed all the same
            log.exception("steps of %s", arm)
            failed[arm] = f"{type(e).__name__}: {e}"
    seconds = seconds_in_turn(steps)
    configs = {arm: trained[arm][0].to_dict() for arm in steps}
    write_json(output, {"trained": configs, "seconds": seconds, "failed": failed})
    return seconds, failed

"""How long a training step of each arm of a size takes, all arms in turn in one process.

Runs that are trained at the same time, or on a machine that others use too, say little of each other's speed. Here every arm
takes a few steps, then the next one, round by round; on CPU, processor seconds are counted.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config import Config
from aoe_jax.json_files import write_json
from aoe_jax.sharding import batch_sharding, fill_mesh, make_mesh, put_batch, replicated, state_shardings
from aoe_jax.training.step import init_state, make_train_step

ROUNDS, STEPS = 10, 3  # the first step of a round isn't counted: caches are still those of another arm


def time_steps(configs: Mapping[str, Config], output: Path):
    """Writes the median seconds of a step to a JSON file.

    Args:
      configs: arm -> configuration; all must fit the devices together.
      output: the file; it has `configs`, and `seconds` by arm.

    Returns:
      The seconds by arm.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    steps, seconds = {arm: _compiled(config) for arm, config in configs.items()}, {arm: [] for arm in configs}
    for _ in range(ROUNDS):
        for arm, step in steps.items():
            for number in range(STEPS):
                started = clock()
                jax.block_until_ready(step())
                if number:
                    seconds[arm].append(clock() - started)
    found = {arm: statistics.median(values) for arm, values in seconds.items()}
    write_json(output, {"configs": {arm: config.to_dict() for arm, config in configs.items()}, "seconds": found})
    return found


def _compiled(config):
    """A nullary function that takes a step on random tokens."""
    config = fill_mesh(config, jax.device_count())
    mesh = make_mesh(config, jax.devices())
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, *shape), np.int32)
    ones = np.ones(shape, np.int32)
    batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": ones, "weights": ones.astype(np.float32)}

    def new_state():
        return init_state(config, config.train.seed)

    with jax.set_mesh(mesh):
        batch = put_batch(batch_sharding(mesh), batch)
        shardings = state_shardings(mesh, jax.eval_shape(new_state))
        state = jax.jit(new_state, out_shardings=shardings)()
        # The very program of a training run, which the compilation cache may have.
        step_function = make_train_step(config)
        compiled = jax.jit(step_function, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        compiled = compiled.lower(state, batch).compile()

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = compiled(state, batch)
        return metrics["loss"]

    return step

"""Training from start to end: `train(config, workdir)` reads like the list of what happens."""

import json
import logging
import os
import time
from functools import partial
from pathlib import Path

import jax

from aoe_jax.config import Config
from aoe_jax.counts import parameter_counts, training_flops_per_token
from aoe_jax.data import open_corpus
from aoe_jax.data.pipeline import train_batches
from aoe_jax.distributed import agree, barrier
from aoe_jax.errors import UserError
from aoe_jax.evaluation.perplexity import evaluate, make_eval_step
from aoe_jax.sharding import (
    MESH_AXES,
    batch_sharding,
    fill_mesh,
    make_mesh,
    put_batch,
    replicated,
    rows_of_process,
    state_shardings,
    with_shardings,
)
from aoe_jax.training.checkpoint import Checkpoints, check_data, check_workdir, claim_workdir, write_json
from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.telemetry import NoTelemetry, Telemetry

log = logging.getLogger(__name__)

EXPERT_CHOICE_WARNING = (
    "expert choice is not causal: which tokens an expert takes depends on later tokens of the batch, so the losses "
    "below are not those of a causal language model and compare with no token-choice run"
)


def log_run(config: Config):
    """Logs what is about to run: parameters by both conventions, FLOPs, and what to beware of."""
    if jax.device_count() > 1:
        log.info("mesh: %s", ", ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in MESH_AXES))
    log.info("%s", parameter_counts(config))
    log.info("%.1f MFLOPs per token in a training step", training_flops_per_token(config) / 1e6)
    if config.experts.selection == "top_p":
        log.info("both count experts.top_k=%d experts per token; top-p takes more or fewer", config.experts.top_k)
    if config.experts.selection == "expert_choice":
        log.warning("%s", EXPERT_CHOICE_WARNING)


def train(config: Config, workdir: Path):
    """Trains, or goes on from the newest checkpoint of `workdir`.

    Writes `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `tokenizer.json` and, at the end,
    `summary.json`. A run that is stopped anywhere and started again ends in the same state, bit for bit on CPU.

    Returns:
      The summary.

    Raises:
      UserError: see `aoe_jax.errors`; `train.steps` already reached is one.
    """
    filled = fill_mesh(config, jax.device_count())
    mesh = make_mesh(filled, jax.devices())
    with jax.set_mesh(mesh):
        return _train(filled, config, workdir, mesh)


def _train(config, given, workdir, mesh):
    started, is_main = time.perf_counter(), jax.process_index() == 0
    check_workdir(workdir, config)
    log_run(config)
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(workdir, corpus)

    earlier = Checkpoints(workdir)
    first_step = earlier.latest_step() or 0
    summary_file, pending_summary = workdir / "summary.json", workdir / "summary.json.pending"
    lacks_summary = first_step == config.train.steps and pending_summary.exists()  # stopped after its last checkpoint
    agree("the step, configuration or data", f"{first_step} {lacks_summary} {config} {corpus.identities}")
    if lacks_summary:
        if is_main:
            os.replace(pending_summary, summary_file)
        barrier("the summary is there")
        return json.loads(summary_file.read_text())
    if first_step >= config.train.steps:
        raise UserError(
            f"config.train.steps={config.train.steps}: {workdir} is already at step {first_step}; raise it to go on, "
            "or use another --workdir"
        )
    rows = rows_of_process(batch_sharding(mesh), config.train.batch_size, jax.process_index())
    data = iter(
        train_batches(
            corpus.train,
            corpus.weights,
            config.data.seq_len,
            config.train.batch_size,
            config.train.seed,
            rows,
            config.data.loss_mask,
        )
    )

    def new_state():
        return init_state(config, config.train.seed)

    abstract = jax.eval_shape(new_state)
    shardings, everywhere = state_shardings(mesh, abstract), replicated(mesh)
    if first_step:
        state = earlier.restore(first_step, with_shardings(abstract, shardings), data)
        log.info("going on from step %d", first_step)
    else:
        state = jax.jit(new_state, out_shardings=shardings)()
    earlier.close()
    if is_main:
        claim_workdir(workdir, given, corpus)
        summary_file.unlink(missing_ok=True)
    checkpoints = Checkpoints(workdir, config.checkpoint)

    put = partial(put_batch, batch_sharding(mesh), rows=rows, n_rows=config.train.batch_size)
    batch = put(next(data))
    compile_started = time.perf_counter()
    train_step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(shardings, everywhere))
    train_step = train_step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - compile_started
    log.info("compiled the train step in %.1f s", compile_seconds)
    eval_step = jax.jit(make_eval_step(config), out_shardings=everywhere)

    def validate(state):
        score = partial(eval_step, state.params, state.selection_bias)
        n_rows = config.train.batch_size // config.train.accumulate
        return evaluate(score, corpus.validation, config.data.seq_len, n_rows, partial(put_batch, batch_sharding(mesh)))

    tokens_per_step = config.train.batch_size * config.data.seq_len
    kind = Telemetry if is_main else NoTelemetry
    telemetry = kind(workdir, first_step, config.train.steps, tokens_per_step)
    loop_started = time.perf_counter()
    logged = None  # (step, metrics), fetched while the next step runs
    with jax.transfer_guard("disallow"):
        for step in range(first_step + 1, config.train.steps + 1):
            state, metrics = train_step(state, batch)
            if logged:
                telemetry.train(logged[0], jax.device_get(logged[1]))
            logged = (step, metrics) if step % config.train.log_every == 0 or step == config.train.steps else None
            if step == config.train.steps:
                break
            validating = config.train.eval_every and step % config.train.eval_every == 0
            # A step is reported before it is saved, so that a kill in between loses no line of metrics.jsonl.
            if logged and (validating or checkpoints.due(step)):
                telemetry.train(logged[0], jax.device_get(logged[1]))
                logged = None
            if validating:
                result = validate(state)
                telemetry.evaluation(step, result)
            if checkpoints.due(step):
                checkpoints.save(step, state, data)
            batch = put(next(data))
    last_metrics = jax.device_get(logged[1])
    telemetry.train(logged[0], last_metrics)
    loop_seconds = time.perf_counter() - loop_started
    result = validate(state)
    telemetry.evaluation(config.train.steps, result)
    telemetry.close()

    summary = {
        "metrics": {
            "step": config.train.steps,
            "tokens": config.train.steps * tokens_per_step,
            "train_loss": float(last_metrics["loss"]),
            "train_nll": float(last_metrics["nll"]),
            "validation_perplexity": result.perplexity,
            **{f"validation_{name}": value for name, value in result.figures().items()},
        },
        "parameters": {"total": parameter_counts(config).total, "active": parameter_counts(config).active},
        "timing": {
            "tokens_per_second": (config.train.steps - first_step) * tokens_per_step / loop_seconds,
            "compile_seconds": compile_seconds,
            "total_seconds": time.perf_counter() - started,
        },
    }
    if is_main:
        write_json(
            pending_summary, summary
        )  # before the checkpoint, as are the metrics: a run that has it lacks nothing
    checkpoints.save(config.train.steps, state, data)
    checkpoints.close()
    if is_main:
        os.replace(pending_summary, summary_file)
    log.info("done: %s", json.dumps(summary["metrics"]))
    return summary

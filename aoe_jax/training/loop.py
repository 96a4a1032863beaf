"""The training loop: `train` opens the run and the data, trains, validates and saves."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from aoe_jax import sharding
from aoe_jax.config.run import Config
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus, with_vocabulary
from aoe_jax.distributed import all_agree, gathered, together
from aoe_jax.errors import DivergedError, Stopped
from aoe_jax.model.counts import log_run
from aoe_jax.model.decoder import Decoder
from aoe_jax.storage.files import read_metrics, write_json
from aoe_jax.storage.retry import Tolerated, patiently
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.heartbeat import Heartbeat
from aoe_jax.training.metrics import Metrics, in_words
from aoe_jax.training.run_folder import RunFolder, read_heartbeat
from aoe_jax.training.step import TrainState, new_state, train_step_on
from aoe_jax.training.stopping import StopRequests
from aoe_jax.training.validation import compile_eval_step, evaluate

log = logging.getLogger(__name__)


@dataclass
class Now:
    """The variables of the loop."""

    step: int  # updates done
    state: TrainState | None = None  # state after these updates
    batch: dict[str, Any] | None = None  # batch of the next step
    progress: Progress | None = None
    can_score: bool = False  # whether the evaluation step is compiled
    can_sample: bool = False  # whether the programs that sample text are compiled
    saved_at: float = field(default_factory=time.monotonic)  # time of the newest save, in seconds


def every(n, call, last=None):
    """Returns `hook(step)`. It runs `call()` if `step` is `last`, or n > 0 divides `step`."""

    def hook(step):
        if (n and step % n == 0) or step == last:
            call()

    return hook


def train(
    config: Config,
    workdir: Path,
    stop: StopRequests,
    profile: range,
    wandb: str | None,
    branch: tuple[Path, int] | None,
    text_sampler: Callable,
    **start,
):
    """Starts or continues a run in `workdir`; returns the content of its `summary.json`.

    Writes `config.json`, `data.json`, `metrics.jsonl`, `heartbeat.json`, `tensorboard/`,
    `checkpoints/`, the tokenizer and, at the end, `summary.json` and `training.png`. It also writes
    a trace of the steps `profile` to `profile/`, and `wandb/` if `wandb` is a project of Weights &
    Biases. `text_sampler` is the function of this name in `evaluation`, for `train.sample_every`.
    `start` has arguments of `RunFolder.begin`. If `branch` is `(DIR, STEP)`, a new run begins with
    that checkpoint of the run in DIR. A run that is stopped at any moment and started again ends in
    the same state as a run without a stop, on CPU bit for bit.

    Raises the exceptions of `errors.py`: `UserError` also if the run has already finished, and
    `Stopped` after a request to stop, once the state is saved.
    """
    started, is_main = time.perf_counter(), jax.process_index() == 0
    with together():
        given = config = with_vocabulary(config)
    checkpoints, folder = Checkpoints(workdir), RunFolder(workdir)
    config = sharding.fill_mesh(config, jax.device_count())
    mesh = sharding.make_mesh(config, jax.devices())
    steps, batch_size, seq_len = config.train.steps, config.train.batch_size, config.data.seq_len

    with contextlib.ExitStack() as held:
        held.enter_context(jax.set_mesh(mesh))
        heartbeat = held.enter_context(Heartbeat(workdir, config.train.hang_timeout))

        # Opens the folder and the data. The run writes its files only after all checks.
        folder.open(held)
        held.push(heartbeat.end)
        with together():
            if is_main and branch:
                from aoe_jax.training.starting import begin_branch  # slow to import

                heartbeat.beat("preparing")
                begin_branch(workdir, config, *branch)
        with together():
            log_run(config)
            if any(s.name != "prepared" or "://" in str(s.path) for s in config.data.sources):
                heartbeat.beat("preparing")
            corpus = open_corpus(config.data, config.model.vocab_size)
            if config.train.sample_every:
                sample = text_sampler(config, mesh, corpus)
        heartbeat.beat("restoring")
        folder.begin(held, config, corpus, **start)
        saved_steps = checkpoints.agreed_steps()
        folder.check(config, corpus, saved_steps)
        now = Now(gathered(max(saved_steps, default=0))[0], progress=Progress())

        # The state comes from a checkpoint, from a trained model, or from random initialisation.
        split = sharding.batch_sharding(mesh)
        rows = sharding.rows_of_process(split, batch_size, jax.process_index())
        seed, mask = config.train.seed, config.data.loss_mask
        data = train_batches(corpus.train, corpus.weights, seq_len, batch_size, seed, rows, mask)
        step_function, like = train_step_on(mesh, config)
        if now.step:
            now.step, now.state, now.progress = checkpoints.restore_newest(like)
            data.set_state({"next_index": now.step})  # a step reads one batch
            log.info(f"going on from step {now.step}")
        elif config.train.init_from:
            from aoe_jax.training.starting import state_from_model  # slow to import

            if "://" in config.train.init_from:  # it is copied
                heartbeat.beat("preparing")
            now.state = state_from_model(config, mesh, like, corpus.tokenizer)
        else:
            heartbeat.beat("compiling")
            now.state = new_state(config, like)
        heartbeat.beat("restoring", now.step)
        with together():
            now.batch = sharding.put_batch(split, next(data), batch_size)
        heartbeat.beat("compiling", now.step)
        lowered = step_function.lower(now.state, now.batch)

        # From here on the run writes files.
        began = read_heartbeat(workdir)["began"] or time.time()
        metrics = Metrics(folder.on_disk, config, now.step, now.progress, began)
        held.enter_context(contextlib.closing(metrics))
        with together():
            if is_main:
                folder.check_lease()
                cannot = f"--workdir={workdir} cannot be written"
                patiently(cannot, lambda: metrics.open(folder.check_lease, wandb))
                patiently(cannot, lambda: folder.claim(given, corpus))
                heartbeat.begin(now.step, began, folder.is_owner)
        checkpoints.open(config.checkpoint)

        heartbeat.beat("compiling", now.step)
        with metrics.clock("compile"):
            train_step = lowered.compile()
        eval_step = compile_eval_step(Decoder.from_config(config), config.data.document_mask, mesh)
        metrics.begin(now.state, train_step)
        if profile:
            from aoe_jax.training.profile import tracing

            train_step = tracing(train_step, profile, folder.on_disk / "profile", now.step + 1)

        def stop_if_asked():
            if stop.asked():
                place = f"step {now.step} of {steps}"
                raise stop.end(f"saved at {place}; the same command goes on from there")

        def validate():
            def put(batch):
                stop_if_asked()
                heartbeat.beat("validating" if now.can_score else "compiling", now.step)
                return sharding.put_batch(split, batch)

            def score(batch):
                sums = eval_step(now.state.params, now.state.routing_state, batch)
                now.can_score = True
                heartbeat.beat("validating", now.step)
                return sums

            metrics.flush()
            now.progress.validated = False
            heartbeat.beat("validating", now.step)
            with metrics.clock("evaluation"):
                size = batch_size // config.train.accumulate
                result = evaluate(score, corpus.validation, seq_len, size, put)
            metrics.validation(now.step, result)
            now.progress.validated, now.progress.validation = True, result.metrics()

        def show_sample():
            metrics.flush()
            heartbeat.beat("sampling" if now.can_sample else "compiling", now.step)
            with metrics.clock("sample"), jax.transfer_guard("allow"):
                text = sample(now.state.params, now.state.routing_state)
            now.can_sample = True
            metrics.sample(now.step, text)

        def save(wait=False):
            metrics.flush()
            if not wait and (now.step == steps or now.progress.skipped_in_row):
                return  # the last step is saved below; after skipped steps nothing is saved
            heartbeat.beat("saving", now.step)
            with metrics.clock("checkpoint"):
                with together():
                    folder.check_lease()
                    patiently("metrics.jsonl cannot be written", metrics.sync)
                    patiently("the metrics cannot be copied", folder.upload)
                checkpoints.save(now.step, now.state, now.progress, wait)
            heartbeat.saved, now.saved_at = checkpoints.saved, time.monotonic()

        def save_by_clock():
            # Clocks differ between processes, so the processes agree before they save together.
            minutes = config.checkpoint.every_minutes
            if minutes and all_agree(time.monotonic() > now.saved_at + 60 * minutes):
                save()

        hooks = [
            every(config.train.eval_every, validate, last=steps),
            every(config.train.sample_every, show_sample),  # before the checkpoint of the same step
            every(config.checkpoint.every, save),
            every(config.train.log_every, save_by_clock),
        ]

        # Runs the training steps.
        try:
            with jax.transfer_guard("disallow"):
                is_due = now.step == steps and not now.progress.validation
                if is_due or not now.progress.validated:
                    validate()
                    checkpoints.note(now.step, now.progress.validation)
                while now.step < steps:
                    now.step += 1
                    now.progress.validation = None
                    now.state, found = train_step(now.state, now.batch)
                    metrics.step(now.step, found)  # reports the previous step while this one runs
                    heartbeat.beat("training", now.step)
                    for hook in hooks:
                        hook(now.step)
                    stop_if_asked()
                    if checkpoints.has_failed():
                        save(wait=True)
                    heartbeat.saved = checkpoints.saved
                    if now.step < steps:
                        with metrics.clock("input"):
                            now.batch = sharding.put_batch(split, next(data), batch_size)
        except Stopped:
            save(wait=True)
            checkpoints.close()
            raise
        except DivergedError:  # saves nothing, so the next start begins before the skipped steps
            checkpoints.close()
            try:
                metrics.sync()
                folder.upload()
            except Exception as e:  # the divergence is what the user must see
                log.warning(f"the last metrics cannot be copied ({e})")
            raise

        # Writes the last checkpoint and the summary.
        metrics.flush()
        summary = metrics.summary(now.step, time.perf_counter() - started)
        save(wait=True)
        checkpoints.close()
        with together():  # no process ends before `heartbeat.json` says "finished"
            if is_main:
                file, name = workdir / "summary.json", workdir.absolute().name
                patiently("the metrics cannot be copied", folder.upload)
                patiently(f"{file} cannot be written", lambda: write_json(file, summary))
                with Tolerated("training.png"):
                    from aoe_jax.training.picture import draw_runs, write_png  # slow to import

                    title = f"{name}: {config.experts.kind}, {in_words(summary)}"
                    lines = list(read_metrics(folder.on_disk / "metrics.jsonl"))
                    write_png(workdir / "training.png", draw_runs({name: lines}, title))
            heartbeat.beat("finished", now.step)
        log.info("done: %s", json.dumps(summary["metrics"]))
        return summary

"""Training from start to end: `train(config, workdir)` reads like the list of what happens."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from aoe_jax.config import Config
from aoe_jax.counts import parameter_counts, training_flops_per_token
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import TokenisedCorpus, open_corpus
from aoe_jax.distributed import agree
from aoe_jax.errors import DivergedError, Interrupted, Preempted, UserError, is_disk_full
from aoe_jax.evaluation.perplexity import evaluate, make_eval_step
from aoe_jax.experts.kinds import LAYERS
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.json_files import write_json
from aoe_jax.locking import alone_in
from aoe_jax.model.decoder import Decoder
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
from aoe_jax.stopping import StopRequests
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.health import Health, Heartbeat
from aoe_jax.training.profile import Profile, Window
from aoe_jax.training.starting import check_start, state_from_model
from aoe_jax.training.step import init_state, make_train_step
from aoe_jax.training.telemetry import NoTelemetry, Telemetry
from aoe_jax.training.workdir import check_data, check_workdir, claim_workdir, make_workdir
from aoe_jax.training.writers import check_wandb

log = logging.getLogger(__name__)

NOT_CAUSAL_WARNING = (
    "%s is not causal: %s, so the losses below are not those of a causal language model and compare with no token-choice "
    "run"
)
LATER_CAUSAL_WARNING = (
    "%s is not causal before step %d: %s, so the training losses up to then know of later tokens"
)


def log_run(config: Config):
    """Logs what is about to run: parameters by both conventions, FLOPs, and what to beware of."""
    if jax.device_count() > 1:
        log.info(
            "mesh: %s", ", ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in MESH_AXES)
        )
    log.info("%s", parameter_counts(config))
    log.info("%.1f MFLOPs per token in a training step", training_flops_per_token(config) / 1e6)
    if SELECTIONS[config.experts.selection].experts_per_token(config.experts) is None:
        name = config.experts.selection.replace("_", " ")
        log.info(
            "both count experts.top_k=%d experts per token; %s takes another number",
            config.experts.top_k,
            name,
        )
    _warn_of_later_tokens(config)


def _warn_of_later_tokens(config):
    kind, method = LAYERS[config.experts.kind], SELECTIONS[config.experts.selection]
    if reason := kind.not_causal_because(config.experts):
        log.warning(NOT_CAUSAL_WARNING, f"a {config.experts.kind}", reason)
    if not kind.selects:
        return
    name = config.experts.selection.replace("_", " ")
    if until := method.not_causal_until(config.method_settings):
        log.warning(LATER_CAUSAL_WARNING, name, until, method.not_causal_because)
    elif not method.causal:
        log.warning(NOT_CAUSAL_WARNING, name, method.not_causal_because)


def train(
    config: Config,
    workdir: Path,
    stop: StopRequests | None = None,
    profile: Window | None = None,
    wandb_project: str | None = None,
):
    """Trains, or goes on from the newest checkpoint of `workdir`.

    Writes `config.json`, `metrics.jsonl`, `heartbeat.json`, `tensorboard/`, `checkpoints/`,
    `tokenizer.json` and, at the end, `summary.json`. A run that is stopped anywhere and started
    again ends in the same state, bit for bit on CPU.

    Args:
      config: the run.
      workdir: its directory.
      stop: the requests to heed; None: there are none.
      profile: steps to trace into `profile/`.
      wandb_project: a project of Weights & Biases that is sent the figures; it keeps its files in
        `wandb/`.

    Returns:
      The summary.

    Raises:
      UserError: see `aoe_jax.errors`; `train.steps` already reached is one.
      DivergedError: `train.max_skipped` updates in a row were skipped.
      Stopped: `stop` was asked; what was done is saved.
    """
    if config.experts.gate == "sparsemixer":
        raise UserError(
            "config.experts.gate='sparsemixer': weighs the experts of a model that is trained already, its own training "
            "samples and isn't implemented; train with 'chosen' or 'all'"
        )
    filled = fill_mesh(config, jax.device_count())
    mesh = make_mesh(filled, jax.devices())
    heartbeat = Heartbeat(workdir)
    try:
        with jax.set_mesh(mesh), contextlib.ExitStack() as held:
            return _train(
                filled,
                config,
                workdir,
                mesh,
                stop or StopRequests(),
                profile,
                wandb_project,
                heartbeat,
                held,
            )
    except BaseException as e:
        with contextlib.suppress(OSError):  # that the disk is full is said below
            heartbeat.beat(_LAST_STATUS.get(type(e), "failed"))
        if isinstance(e, OSError) and is_disk_full(e):
            raise UserError(
                f"--workdir={workdir}: no space left on the disk; free some, and the same command goes on from the newest "
                "checkpoint"
            ) from e
        if heartbeat.step is not None:
            again = (
                "the same command goes on"
                if jax.process_count() == 1
                else "start all processes again: they go on"
            )
            e.add_note(f"after step {heartbeat.step}; {again} from the newest checkpoint")
        raise


_LAST_STATUS = {Preempted: "preempted", Interrupted: "interrupted", DivergedError: "diverged"}


@dataclass
class _Run:
    """What goes on around the steps: reports, validations and checkpoints."""

    config: Config
    mesh: Mesh
    corpus: TokenisedCorpus
    data_state: Callable  # the position in the training data
    checkpoints: Checkpoints
    telemetry: Telemetry | NoTelemetry
    health: Health
    heartbeat: Heartbeat
    stop: StopRequests
    eval_step: Callable
    last: dict | None = None  # loss and nll of the newest step that is reported

    def report(self, step, metrics):
        """Takes in the metrics of a step; waits for it."""
        now = jax.device_get(
            {name: metrics[name] for name in ("loss", "nll", "grad_norm", "finite")}
        )
        self.health.step(step, now["loss"], now["grad_norm"], now["finite"])
        self.heartbeat.beat("training", step)
        self.checkpoints.check()
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            metrics = jax.device_get(metrics)
            self.health.load(step, metrics["load"], metrics.get("live"))
            self.telemetry.train(step, metrics)
        self.last = {name: now[name] for name in ("loss", "nll")}

    def validate(self, step, state):
        """The `Evaluation` of the validation split, or None where the run is asked to stop
        meanwhile.
        """
        sharding, train = batch_sharding(self.mesh), self.config.train

        def put(batch):
            self.heartbeat.beat("validating", step)
            if self.stop.asked():
                raise _ValidationStopped
            return put_batch(sharding, batch)

        try:
            with self.telemetry.clock("evaluation"):
                result = evaluate(
                    partial(self.eval_step, state.params, state.routing_state),
                    self.corpus.validation,
                    self.config.data.seq_len,
                    train.batch_size // train.accumulate,
                    put,
                )
        except _ValidationStopped:
            return None
        self.telemetry.evaluation(step, result)
        self.checkpoints.validated(step, result.nll)
        return result

    def save(self, step, state, validated=True):
        """Saves in the background; `validated`: whether a validation that is due after this step is
        done.
        """
        self.heartbeat.beat("saving", step)
        last = {name: float(value) for name, value in self.last.items()}
        progress = Progress(**last, validated=validated, skipped_in_row=self.health.skipped_in_row)
        with self.telemetry.clock("checkpoint"):
            self.telemetry.sync()
            self.checkpoints.save(step, state, self.data_state(), progress)


@contextlib.contextmanager
def _last_save_is_waited_for(checkpoints):
    """Where training can't get on, what is being saved in the background is the last good state."""
    try:
        yield
    except DivergedError:  # in all processes at once, as waiting wants it
        checkpoints.close()
        raise


class _ValidationStopped(Exception):
    """The run is asked to stop."""


def _train(config, given, workdir, mesh, stop, window, wandb_project, heartbeat, held):
    started, is_main, steps = time.perf_counter(), jax.process_index() == 0, config.train.steps
    check_workdir(workdir, config)
    locked = is_main and workdir.exists()
    if locked:
        held.enter_context(alone_in(workdir, "workdir"))
    log_run(config)
    earlier = Checkpoints(workdir)
    newest = earlier.latest_step() or 0
    if config.train.init_from and not newest:
        check_start(config)
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(workdir, corpus)

    summary_file = workdir / "summary.json"
    agree("the step, configuration or data", f"{newest} {config} {corpus.identities}")
    if newest > steps or (newest == steps and summary_file.exists()):
        raise UserError(
            f"config.train.steps={steps}: {workdir} is already at step {newest}; raise it to go on, or use another --workdir"
        )
    window = window.of_run(newest, steps) if window else None
    if wandb_project is not None:
        check_wandb(workdir, wandb_project)
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
    if newest:
        first_step, state, progress = earlier.restore_newest(
            with_shardings(abstract, shardings), data
        )
        log.info("going on from step %d", first_step)
    elif config.train.init_from:
        first_step, state, progress = (
            0,
            state_from_model(config, mesh, shardings, corpus.tokenizer),
            None,
        )
    else:
        first_step, state, progress = 0, jax.jit(new_state, out_shardings=shardings)(), None
    earlier.close()
    if is_main:
        if not locked:  # it wasn't there: another process may have made it meanwhile
            make_workdir(workdir)
            held.enter_context(alone_in(workdir, "workdir"))
            check_workdir(workdir, config)
            check_data(workdir, corpus)
            if Checkpoints(workdir).latest_step():
                raise UserError(
                    f"--workdir={workdir}: another process has trained there meanwhile; start again to go on"
                )
        claim_workdir(workdir, given, corpus)
        heartbeat.start()
        summary_file.unlink(missing_ok=True)

    # A run that lacks nothing but its summary validates its last step again.
    validated = progress is None or (progress.validated and first_step < steps)
    telemetry = (Telemetry if is_main else NoTelemetry)(
        workdir, config, first_step, validated, wandb_project
    )
    held.enter_context(contextlib.closing(telemetry))
    profile = Profile(workdir / "profile", window if is_main else None)
    put = partial(put_batch, batch_sharding(mesh), rows=rows, n_rows=config.train.batch_size)
    batch = put(next(data))
    heartbeat.beat("compiling", first_step)
    with telemetry.clock("compile"):
        train_step = jax.jit(
            make_train_step(config), donate_argnums=0, out_shardings=(shardings, everywhere)
        )
        train_step = train_step.lower(state, batch).compile()

    run = _Run(
        config,
        mesh,
        corpus,
        data.get_state,
        Checkpoints(workdir, config.checkpoint),
        telemetry,
        Health(
            config.train.max_skipped,
            config.train.batch_size,
            progress.skipped_in_row if progress else 0,
        ),
        heartbeat,
        stop,
        jax.jit(
            make_eval_step(Decoder.from_config(config), config.data.document_mask),
            out_shardings=everywhere,
        ),
        progress and {"loss": progress.loss, "nll": progress.nll},
    )
    telemetry.start(state, train_step)
    held.enter_context(stop.between_steps(several=jax.distributed.is_initialized()))
    held.enter_context(_last_save_is_waited_for(run.checkpoints))
    with jax.transfer_guard("disallow"):
        validation = None
        if not validated:
            validation = run.validate(first_step, state)
            if validation is None:
                raise stop.end(
                    f"at step {first_step}, which is saved; the same command goes on from there"
                )
        unreported = None  # (step, metrics), taken in while the next step runs
        for step in range(first_step + 1, steps + 1):
            state, metrics = profile.run(step, train_step, state, batch)
            if unreported:
                run.report(*unreported)
            unreported = step, metrics
            last, stopping = step == steps, stop.asked()
            validating = last or (
                config.train.eval_every > 0 and step % config.train.eval_every == 0
            )
            saving = stopping or (not last and run.checkpoints.due(step))
            # A step is reported before it is saved, so that a kill in between loses no line of
            # metrics.jsonl.
            if validating or saving:
                run.report(*unreported)
                unreported = None
            validation = run.validate(step, state) if validating and not stopping else None
            if stopping or (validating and validation is None):
                run.save(step, state, validated=not validating)
                run.checkpoints.close()
                raise stop.end(
                    f"saved at step {step} of {steps}; the same command goes on from there"
                )
            if saving and not run.health.skipped_in_row:
                run.save(step, state)
            if not last:
                with telemetry.clock("input"):
                    batch = put(next(data))

    summary = {
        "metrics": {
            "step": steps,
            "tokens": steps * config.tokens_per_step,
            "train_loss": float(run.last["loss"]),
            "train_nll": float(run.last["nll"]),
            "validation_perplexity": validation.perplexity,
            **{f"validation_{name}": value for name, value in validation.figures().items()},
        },
        "parameters": {
            "total": parameter_counts(config).total,
            "active": parameter_counts(config).active,
        },
        "timing": telemetry.timing() | {"total_seconds": time.perf_counter() - started},
        "memory": telemetry.memory(),
    }
    if first_step < steps:
        run.save(steps, state)
    run.checkpoints.close()
    if is_main:
        write_json(summary_file, summary)
    heartbeat.beat("finished", steps)
    log.info("done: %s", json.dumps(summary["metrics"]))
    return summary

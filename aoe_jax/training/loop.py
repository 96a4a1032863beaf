"""Training from start to end: `train` lists what happens, `_Run` does it."""

import contextlib
import json
import logging
import time
from pathlib import Path

import jax

from aoe_jax.config.run import Config
from aoe_jax.counts import experts_per_token, parameter_counts, training_flops_per_token
from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.distributed import agree
from aoe_jax.errors import DivergedError, Interrupted, Preempted, UserError, is_disk_full
from aoe_jax.evaluation.perplexity import compile_eval_step, evaluate
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
from aoe_jax.training.telemetry import Telemetry
from aoe_jax.training.workdir import check_data, check_workdir, claim_workdir, make_workdir
from aoe_jax.training.writers import check_wandb

log = logging.getLogger(__name__)

NOT_CAUSAL_WARNING = (
    "%s is not causal: %s, so the losses below are not those of a causal language model and are "
    "comparable with no token-choice run"
)
LATER_CAUSAL_WARNING = (
    "%s is not causal before step %d: %s, so the training losses of these steps depend on later "
    "tokens"
)


def log_run(config: Config):
    """Logs the mesh, parameters and FLOPs of a run, and warns if its losses are not causal."""
    if jax.device_count() > 1:
        log.info(
            "mesh: %s", ", ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in MESH_AXES)
        )
    log.info("%s", parameter_counts(config))
    log.info("%.1f MFLOPs per token in a training step", training_flops_per_token(config) / 1e6)
    if experts_per_token(config) is None:
        log.info(
            "both count experts.top_k=%d experts per token; %s takes a varying number",
            config.experts.top_k,
            config.routing.name,
        )
    _warn_of_later_tokens(config)


def _warn_of_later_tokens(config):
    causality, name = config.routing.causality(config.experts), config.routing.name
    if not causality.reason:
        return
    if causality.until_step is None:
        log.warning(NOT_CAUSAL_WARNING, name, causality.reason)
    else:
        log.warning(LATER_CAUSAL_WARNING, name, causality.until_step, causality.reason)


def train(
    config: Config,
    workdir: Path,
    stop: StopRequests | None = None,
    profile: Window | None = None,
    wandb_project: str | None = None,
):
    """Trains, or continues from the newest checkpoint of `workdir`.

    Writes `config.json`, `data.json`, `metrics.jsonl`, `heartbeat.json`, `tensorboard/`,
    `checkpoints/`, the tokenizer and, at the end, `summary.json`. A run that is stopped at any
    moment and started again ends in the same state, on CPU bit for bit.

    Args:
      config: the run.
      workdir: its directory.
      stop: requests to stop; None: there are none.
      profile: steps to trace into `profile/`.
      wandb_project: a project of Weights & Biases that receives the figures too; `wandb/` holds
        its files.

    Returns:
      The content of `summary.json`.

    Raises:
      UserError: a mistake of the user, also if `train.steps` is reached already.
      DivergedError: `train.max_skipped` updates in a row were skipped.
      Stopped: `stop` was asked; the state is saved.
    """
    if config.routing.name == "sparsemixer":
        raise UserError(
            "config.routing.name='sparsemixer': can be evaluated but not trained, since the "
            "sampling of its own training is not implemented; train with 'top_k'"
        )
    filled = fill_mesh(config, jax.device_count())
    mesh, heartbeat = make_mesh(filled, jax.devices()), Heartbeat(workdir)
    with _end_is_reported(workdir, heartbeat), jax.set_mesh(mesh), contextlib.ExitStack() as held:
        run = _Run(filled, workdir, mesh, heartbeat, stop or StopRequests(), held)
        run.check(profile, wandb_project)
        run.restore()
        run.claim_workdir(config)
        run.open(wandb_project)
        run.compile()
        with run.stop.between_steps(several=jax.distributed.is_initialized()):
            with jax.transfer_guard("disallow"):
                run.take_steps()
            return run.finish()


@contextlib.contextmanager
def _end_is_reported(workdir, heartbeat):
    """Writes the last heartbeat of a run that ends early, and adds to its error how to go on."""
    statuses = {Preempted: "preempted", Interrupted: "interrupted", DivergedError: "diverged"}
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(OSError):  # a full disk is reported below
            heartbeat.beat(statuses.get(type(e), "failed"))
        if isinstance(e, OSError) and is_disk_full(e):
            raise UserError(
                f"--workdir={workdir}: no space left on the disk; free some, and the same command "
                "goes on from the newest checkpoint"
            ) from e
        if heartbeat.step is not None:
            alone = "the same command goes on"
            together = "start all processes again: they go on"
            again = alone if jax.process_count() == 1 else together
            e.add_note(f"after step {heartbeat.step}; {again} from the newest checkpoint")
        raise


class _ValidationStopped(Exception):
    """The run was asked to stop during a validation."""


class _Run:
    """One training run. `train` calls its public methods in the order in which they stand here."""

    def __init__(self, config, workdir, mesh, heartbeat, stop, held):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.heartbeat, self.stop, self.held = heartbeat, stop, held
        self.started, self.is_main = time.perf_counter(), jax.process_index() == 0
        self.locked = False
        self.progress = None  # saved with the checkpoint that the run continues from
        self.unreported = None  # step and metrics, which are read while the next step runs
        self.validation = None  # the newest result

    def check(self, window, wandb_project):
        """Checks all that a user may have got wrong; writes nothing but token stores."""
        config, workdir = self.config, self.workdir
        check_workdir(workdir, config)
        if self.is_main and workdir.exists():
            self._lock_workdir()
        log_run(config)
        self.checkpoints = Checkpoints(workdir)
        self.newest = self.checkpoints.latest_step() or 0
        if config.train.init_from and not self.newest:
            check_start(config)
        self.corpus = open_corpus(config.data, config.model.vocab_size)
        check_data(workdir, self.corpus)
        agree("the step, configuration or data", f"{self.newest} {config} {self.corpus.identities}")
        steps, finished = config.train.steps, (workdir / "summary.json").exists()
        if self.newest > steps or (self.newest == steps and finished):
            raise UserError(
                f"config.train.steps={steps}: {workdir} is already at step {self.newest}; raise it "
                "to go on, or use another --workdir"
            )
        window = window.of_run(self.newest, steps) if window else None
        self.profile = Profile(workdir / "profile", window if self.is_main else None)
        if wandb_project is not None:
            check_wandb(workdir, wandb_project)

    def restore(self):
        """Makes the first state: from a checkpoint, from a model, or at random."""
        config = self.config
        sharding = batch_sharding(self.mesh)
        self.rows = rows_of_process(sharding, config.train.batch_size, jax.process_index())
        self.data = iter(
            train_batches(
                self.corpus.train,
                self.corpus.weights,
                config.data.seq_len,
                config.train.batch_size,
                config.train.seed,
                self.rows,
                config.data.loss_mask,
            )
        )

        def new_state():
            return init_state(config, config.train.seed)

        abstract = jax.eval_shape(new_state)
        self.shardings, self.step = state_shardings(self.mesh, abstract), 0
        if self.newest:
            self.step, self.state, self.progress = self.checkpoints.restore_newest(
                with_shardings(abstract, self.shardings), self.data
            )
            log.info("going on from step %d", self.step)
        elif config.train.init_from:
            self.state = state_from_model(config, self.mesh, self.shardings, self.corpus.tokenizer)
        else:
            self.state = jax.jit(new_state, out_shardings=self.shardings)()
        self.first_step = self.step
        self.checkpoints.close()

    def claim_workdir(self, given):
        """Makes the workdir the run's own; `given` is the configuration as the user gave it."""
        if not self.is_main:
            return
        if not self.locked:  # it did not exist; another process may have made it meanwhile
            make_workdir(self.workdir)
            self._lock_workdir()
            check_workdir(self.workdir, self.config)
            check_data(self.workdir, self.corpus)
            if Checkpoints(self.workdir).latest_step():
                raise UserError(
                    f"--workdir={self.workdir}: another process has trained there meanwhile; "
                    "start again to go on"
                )
        claim_workdir(self.workdir, given, self.corpus)
        self.heartbeat.start()
        (self.workdir / "summary.json").unlink(missing_ok=True)

    def _lock_workdir(self):
        self.held.enter_context(alone_in(self.workdir, "workdir"))
        self.locked = True

    def open(self, wandb_project):
        """Opens what the run writes: figures and checkpoints."""
        train, progress = self.config.train, self.progress
        # A run that lacks nothing but its summary validates its last step again.
        self.validated = progress is None or (progress.validated and self.step < train.steps)
        self.telemetry = Telemetry(
            self.workdir,
            self.config,
            self.step,
            self.validated,
            wandb_project,
            writes=self.is_main,
        )
        self.held.enter_context(contextlib.closing(self.telemetry))
        skipped = progress.skipped_in_row if progress else 0
        self.health = Health(train.max_skipped, train.batch_size, skipped)
        self.losses = progress and {"loss": progress.loss, "nll": progress.nll}
        self.checkpoints = Checkpoints(self.workdir, self.config.checkpoint)

    def compile(self):
        """Compiles the training step; time counts as training from the end of this on."""
        everywhere = replicated(self.mesh)
        self.batch = self._next_batch()
        self.heartbeat.beat("compiling", self.step)
        with self.telemetry.clock("compile"):
            step = make_train_step(self.config)
            step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
            self.train_step = step.lower(self.state, self.batch).compile()
        decoder = Decoder.from_config(self.config)
        document_mask = self.config.data.document_mask
        self.eval_step = compile_eval_step(decoder, document_mask, self.mesh)
        self.telemetry.start(self.state, self.train_step)

    def take_steps(self):
        """Trains up to `train.steps`."""
        steps = self.config.train.steps
        if not self.validated and not self.validate():
            raise self.stop.end(
                f"at step {self.step}, which is saved; the same command goes on from there"
            )
        try:
            while self.step < steps:
                self.step += 1
                self.state, metrics = self.profile.run(
                    self.step, self.train_step, self.state, self.batch
                )
                self._report()  # the step before, while this one runs
                self.unreported = self.step, metrics
                self._validate_and_save(last=self.step == steps, stopping=self.stop.asked())
                if self.step < steps:
                    with self.telemetry.clock("input"):
                        self.batch = self._next_batch()
        except DivergedError:  # what is being saved in the background is the last good state
            self.checkpoints.close()
            raise

    def _next_batch(self):
        sharding, n_rows = batch_sharding(self.mesh), self.config.train.batch_size
        return put_batch(sharding, next(self.data), rows=self.rows, n_rows=n_rows)

    def _report(self):
        """Waits for the step that is not reported yet, and takes in its metrics."""
        if self.unreported is None:
            return
        (step, metrics), self.unreported = self.unreported, None
        small = {name: metrics[name] for name in ("loss", "nll", "grad_norm", "finite")}
        small = jax.device_get(small)
        self.health.step(step, small["loss"], small["grad_norm"], small["finite"])
        self.heartbeat.beat("training", step)
        self.checkpoints.check()
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            metrics = jax.device_get(metrics)
            self.health.load(step, metrics["load"], metrics.get("live"))
            self.telemetry.train(step, metrics)
        self.losses = {name: float(small[name]) for name in ("loss", "nll")}

    def _validate_and_save(self, last, stopping):
        """Does what is due after a step; raises `Stopped` if the run was asked to stop."""
        every = self.config.train.eval_every
        validating = last or (every > 0 and self.step % every == 0)
        saving = stopping or (not last and self.checkpoints.due(self.step))
        if validating or saving:
            self._report()  # before the save, so that a kill loses no line of metrics.jsonl
        stopping = stopping or (validating and not self.validate())
        if stopping:
            self.save(validated=not validating)
            self.checkpoints.close()
            raise self.stop.end(
                f"saved at step {self.step} of {self.config.train.steps}; the same command goes on "
                "from there"
            )
        if saving and not self.health.skipped_in_row:
            self.save()

    def validate(self):
        """Scores the validation split; False if the run was asked to stop meanwhile."""
        train, sharding = self.config.train, batch_sharding(self.mesh)

        def step(batch):
            return self.eval_step(self.state.params, self.state.routing_state, batch)

        def put(batch):
            self.heartbeat.beat("validating", self.step)
            if self.stop.asked():
                raise _ValidationStopped
            return put_batch(sharding, batch)

        batch_size = train.batch_size // train.accumulate
        seq_len = self.config.data.seq_len
        try:
            with self.telemetry.clock("evaluation"):
                result = evaluate(step, self.corpus.validation, seq_len, batch_size, put)
        except _ValidationStopped:
            return False
        self.telemetry.evaluation(self.step, result)
        self.checkpoints.validated(self.step, result.nll)
        self.validation = result
        return True

    def save(self, validated=True):
        """Saves in the background.

        Args:
          validated: False if a validation is due after this step and has not been done.
        """
        self.heartbeat.beat("saving", self.step)
        skipped = self.health.skipped_in_row
        progress = Progress(**self.losses, validated=validated, skipped_in_row=skipped)
        with self.telemetry.clock("checkpoint"):
            self.telemetry.sync()
            self.checkpoints.save(self.step, self.state, self.data.get_state(), progress)

    def finish(self):
        """Saves the last state and writes `summary.json`, whose content it returns."""
        counts, figures = parameter_counts(self.config), self.validation.figures()
        summary = {
            "metrics": {
                "step": self.step,
                "tokens": self.step * self.config.tokens_per_step,
                "train_loss": self.losses["loss"],
                "train_nll": self.losses["nll"],
                "validation_perplexity": self.validation.perplexity,
                **{f"validation_{name}": value for name, value in figures.items()},
            },
            "parameters": {"total": counts.total, "active": counts.active},
            "timing": self.telemetry.timing()
            | {"total_seconds": time.perf_counter() - self.started},
            "memory": self.telemetry.memory(),
        }
        if self.step > self.first_step:
            self.save()
        self.checkpoints.close()
        if self.is_main:
            write_json(self.workdir / "summary.json", summary)
        self.heartbeat.beat("finished", self.step)
        log.info("done: %s", json.dumps(summary["metrics"]))
        return summary

"""Training from start to end: `train` lists the phases, `Beginning` and `_Run` implement them."""

import contextlib
import json
import logging
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from aoe_jax import sharding
from aoe_jax.config.run import Config
from aoe_jax.distributed import all_agree, together
from aoe_jax.errors import DivergedError, Interrupted, Preempted, Stopped
from aoe_jax.evaluation.perplexity import compile_eval_step, evaluate
from aoe_jax.model.decoder import Decoder
from aoe_jax.planning.counts import parameter_counts
from aoe_jax.storage.files import write_json
from aoe_jax.storage.retry import Tolerated, patiently
from aoe_jax.training.bar import Bar
from aoe_jax.training.beginning import Beginning
from aoe_jax.training.checkpoint import check_store
from aoe_jax.training.fingerprints import check_repetition, local_fingerprints
from aoe_jax.training.health import Health, Heartbeat
from aoe_jax.training.profile import run_traced
from aoe_jax.training.run_folder import RunFolder, Start
from aoe_jax.training.stopping import StopRequests
from aoe_jax.training.telemetry import Telemetry
from aoe_jax.training.watchdog import Watchdog

log = logging.getLogger(__name__)

PICTURE = "training.png"


def train(
    config: Config,
    workdir: Path,
    stop: StopRequests | None = None,
    profile=range(0),
    wandb=None,
    start: Start | None = None,
):
    """Trains, or continues from the newest checkpoint of `workdir`; returns its `summary.json`.

    Writes `config.json`, `data.json`, `metrics.jsonl`, `heartbeat.json`, `tensorboard/`,
    `checkpoints/`, the tokenizer and, at the end, `summary.json` and `training.png`; `profile/`, a
    trace of the steps `profile`; and `wandb/` if `wandb` is a project of Weights & Biases. A run
    that is stopped at any moment and started again ends in the same state, on CPU bit for bit.

    Raises the exceptions of `errors.py`: `UserError` also if the run has finished, unless `start`
    only resumes, and `Stopped` once the state is saved.
    """
    check_store(workdir)  # before anything is written there
    filled = sharding.fill_mesh(config, jax.device_count())
    mesh, heartbeat = sharding.make_mesh(filled, jax.devices()), Heartbeat(workdir)
    stop, start, folder = stop or StopRequests(), start or Start(), RunFolder(workdir)
    watchdog = Watchdog(folder, heartbeat, stop, filled.train.hang_timeout)
    with watchdog, contextlib.ExitStack() as held, _end_is_reported(heartbeat), jax.set_mesh(mesh):
        heartbeat.beat("restoring")
        folder.open(start, held)
        begun = Beginning(filled, folder, mesh, heartbeat)
        begun.check(profile, wandb, start.resume_only)
        if begun.is_finished:
            return begun.finish_again()
        begun.restore()
        begun.claim_workdir(config)
        run = _Run(begun, stop)
        run.open(wandb, held, watchdog)
        run.compile()
        with contextlib.nullcontext():
            with jax.transfer_guard("disallow"):
                run.take_steps()
            return run.finish()


def result(summary):
    """The result of a run in words, from its `summary.json`."""
    metrics = summary["metrics"]
    return (
        f"step {metrics['step']:,}, {metrics['tokens']:,} tokens, validation nll "
        f"{metrics['validation_nll']:.4f}, bits per byte {metrics['validation_bits_per_byte']:.4f}"
    )


@contextlib.contextmanager
def _end_is_reported(heartbeat):
    """Writes the last heartbeat of a run that ends early, and adds to its error how to go on."""
    statuses = {Preempted: "preempted", Interrupted: "interrupted", DivergedError: "diverged"}
    try:
        yield
    except BaseException as e:
        heartbeat.beat(statuses.get(type(e), "failed"))
        if heartbeat.step is not None:
            alone = jax.process_count() == 1
            again = "the same command goes on" if alone else "start all processes again: they go on"
            e.add_note(f"after step {heartbeat.step}; {again} from the newest checkpoint")
        raise


class _Run:
    """The steps of a run. `train` calls its public methods in the order in which they stand."""

    def __init__(self, begun, stop):
        self.config, self.folder, self.workdir = begun.config, begun.folder, begun.workdir
        self.mesh, self.heartbeat, self.is_main = begun.mesh, begun.heartbeat, begun.is_main
        self.corpus, self.checkpoints, self.local = begun.corpus, begun.checkpoints, begun.local
        self.data, self.batch, self.jitted_step = begun.data, begun.batch, begun.jitted_step
        self.step, self.state, self.progress = begun.step, begun.state, begun.progress
        self.started, self.traced, self.stop = begun.started, begun.traced, stop
        self.first_step, self.saved_at = self.step, time.monotonic()
        self.batch_sharding = sharding.batch_sharding(self.mesh)
        self.has_validated = False  # whether a batch was scored, which compiles the evaluation step
        self.at_rest = threading.Lock()
        self.position = None  # the position in the data while the loop waits for a batch
        self.unreported = None  # step and metrics, which are read while the next step runs

    def _beat(self, status, step):
        self.heartbeat.beat(status, step)
        self.bar.status(status)

    def open(self, wandb, held, watchdog):
        """Opens the figures until `held` is closed, and the checkpoints to save."""
        config, train, progress = self.config, self.config.train, self.progress
        self.heartbeat.beat("restoring", self.step)
        # A run that lacks only its summary validates its last step again.
        progress.validated = progress.validated and self.step < train.steps
        with together():
            self.folder.check_owner()
            given = self.folder.figures, config, self.step, progress.validated, wandb
            self.bar = Bar(self.step, train.steps, shows=self.is_main)
            held.enter_context(contextlib.closing(self.bar))
            watchdog.clear, watchdog.save = self.bar.close, self.save_from_outside
            began, bar = self.heartbeat.began, self.bar
            self.telemetry = patiently(
                "metrics.jsonl cannot be opened",
                lambda: Telemetry(*given, writes=self.is_main, began=began, bar=bar),
            )
            held.enter_context(contextlib.closing(self.telemetry))
        self.health = Health(train.max_skipped, train.batch_size, progress.skipped_in_row)
        self.checkpoints.open(config.checkpoint, self.heartbeat.saved, self.folder.is_in_place)
        if self.local:
            self.local.begin(self.step)

    def compile(self):
        """Compiles the training step; time counts as training from the end of this on."""
        config = self.config
        self._beat("compiling", self.step)
        with self.telemetry.clock("compile"):
            self.train_step = self.jitted_step.lower(self.state, self.batch).compile()
        decoder = Decoder.from_config(config)
        self.eval_step = compile_eval_step(decoder, config.data.document_mask, self.mesh)
        self.telemetry.start(self.state, self.train_step)
        self._beat("training", self.step)

    def take_steps(self):
        steps, folder = self.config.train.steps, self.folder.figures / "profile"
        if not self.progress.validated:
            self.validate()
        try:
            while self.step < steps:
                self.step += 1
                repeated = self._computed_once()
                self.state, metrics = run_traced(
                    self.traced, folder, self.step, self.train_step, self.state, self.batch
                )
                if repeated is not None:
                    check_repetition(self.step, repeated, self.state)
                self._report()  # the step before, while this one runs
                self.unreported = self.step, metrics
                self._validate_and_save()
                if self.step < steps:
                    with self.telemetry.clock("input"):
                        self.position = self.data.get_state()
                        self.batch = self._next_batch()
                        with self.at_rest:  # a save from outside lasts until the end
                            self.position = None
        except DivergedError:  # the save in the background has the last good state
            self.checkpoints.close()
            raise

    def _computed_once(self):
        """Fingerprints of this process's part of the state after this step, if it is repeated."""
        every = self.config.train.repeat_every
        if not every or self.step % every:
            return None
        state, _ = self.train_step(jax.tree.map(jnp.copy, self.state), self.batch)
        return local_fingerprints(state)

    def _next_batch(self):
        n_rows = self.config.train.batch_size
        return sharding.put_batch(self.batch_sharding, next(self.data), n_rows)

    def _report(self):
        """Waits for the step that is not reported yet, and reports its metrics."""
        if self.unreported is None:
            return
        (step, metrics), self.unreported = self.unreported, None
        names = ("loss", "nll", "grad_norm", "finite")
        with self.telemetry.clock("device"):
            small = jax.device_get({name: metrics[name] for name in names})
        self.telemetry.step(step)
        self.health.step(step, small["loss"], small["grad_norm"], small["finite"])
        self.heartbeat.saved = self.checkpoints.saved
        self._beat("training", step)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            metrics = jax.device_get(metrics)
            self.health.load(step, metrics["load"], metrics.get("live"))
            self.telemetry.train(step, metrics)
        self.progress.loss, self.progress.nll = float(small["loss"]), float(small["nll"])
        self.bar.step(step, self.progress.loss)
        self.progress.skipped_in_row = self.health.skipped_in_row

    def _validate_and_save(self):
        """Validates and saves if it is due; saves and raises `Stopped` if a stop was requested."""
        every, last = self.config.train.eval_every, self.step == self.config.train.steps
        validating = last or (every > 0 and self.step % every == 0)
        saving = not last and self._save_is_due()
        copying = not last and self.local and self.step % self.config.checkpoint.local_every == 0
        self.progress.validated = not validating
        if validating or saving or copying:
            self._report()
        try:
            self._stop_if_asked()
            if validating:
                self.validate()
        except Stopped:
            self.save(wait=True)
            self.checkpoints.close()
            raise
        if self.progress.skipped_in_row:
            return
        if saving:
            self.save()
        elif copying:
            self._save_copy()

    def _save_is_due(self):
        settings = self.config.checkpoint
        if self.step % settings.every == 0 or self.checkpoints.has_failed():
            return True
        if not settings.every_minutes or self.step % self.config.train.log_every:
            return False
        # The clocks of processes differ, and all must save.
        return all_agree(time.monotonic() > self.saved_at + 60 * settings.every_minutes)

    def _stop_if_asked(self):
        if self.stop.asked():
            place = f"step {self.step} of {self.config.train.steps}"
            raise self.stop.end(f"saved at {place}; the same command goes on from there")

    def validate(self):
        """Scores the validation split; raises `Stopped` if the run is asked to stop meanwhile."""
        train = self.config.train

        def put(batch):
            self._beat("validating" if self.has_validated else "compiling", self.step)
            self._stop_if_asked()
            return sharding.put_batch(self.batch_sharding, batch)

        def score(batch):
            sums = self.eval_step(self.state.params, self.state.routing_state, batch)
            self.has_validated = True
            self._beat("validating", self.step)
            return sums

        batch_size, seq_len = train.batch_size // train.accumulate, self.config.data.seq_len
        self._beat("validating", self.step)
        with self.telemetry.clock("evaluation"):
            self.validation = evaluate(score, self.corpus.validation, seq_len, batch_size, put)
        self.telemetry.evaluation(self.step, self.validation)
        self.checkpoints.validated(self.step, self.validation.nll)
        self.progress.validated = True

    def save(self, wait=False):
        self._report()  # before, so that a kill loses no line of metrics.jsonl
        self._beat("saving", self.step)
        with self.telemetry.clock("checkpoint"):
            with together():
                self.folder.check_owner()
                patiently("metrics.jsonl cannot be written", self.sync)
            self.checkpoints.finish()  # the save before this one; each has the time of hang_timeout
            self._beat("saving", self.step)
            self.checkpoints.save(self.step, self.state, self.data.get_state(), self.progress, wait)
        self.saved_at = time.monotonic()
        self.heartbeat.saved = self.checkpoints.saved
        self._beat("training", self.step)

    def _save_copy(self):
        """Writes a local copy, after `_report`."""
        position = self.data.get_state()
        with self.telemetry.clock("checkpoint"):
            self.local.save(self.step, self.state, position, self.progress, self.sync)
        self.heartbeat.copied = self.local.saved

    def sync(self):
        """Waits until the figures so far are safe in the workdir, before a checkpoint is saved."""
        self.telemetry.sync()
        self.folder.upload()

    def save_from_outside(self):
        """Saves from another thread if the loop waits for data; returns whether it did."""
        self.at_rest.acquire()  # for good: the process ends afterwards
        if self.position is None or jax.process_count() > 1:
            return False
        self.folder.check_owner()
        self._report()
        self.sync()
        self.checkpoints.save(self.step, self.state, self.position, self.progress, wait=True)
        return True

    def _draw(self, summary):
        title = f"{self.workdir.absolute().name}: {self.config.experts.kind}, {result(summary)}"
        with Tolerated(PICTURE):
            # matplotlib takes half a second to import.
            from aoe_jax.training.picture import write_picture

            write_picture(self.folder.figures / "metrics.jsonl", self.workdir / PICTURE, title)

    def finish(self):
        """Saves the last state and writes `summary.json`, whose content it returns."""
        counts, timing = parameter_counts(self.config), self.telemetry.timing()
        metrics = {
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "train_loss": self.progress.loss,
            "train_nll": self.progress.nll,
            "validation_perplexity": self.validation.perplexity,
            **{f"validation_{name}": v for name, v in self.validation.figures().items()},
        }
        summary = {
            "metrics": metrics,
            "parameters": {"total": counts.total, "active": counts.active},
            "timing": timing | {"total_seconds": time.perf_counter() - self.started},
            "memory": self.telemetry.memory(),
        }
        if self.step > self.first_step:
            self.save(wait=True)
        self.checkpoints.close()
        self.heartbeat.saved = self.step
        if self.is_main:
            path = self.workdir / "summary.json"
            self.folder.check_owner()
            patiently("the figures cannot be written", self.sync)
            patiently(f"{path} cannot be written", lambda: write_json(path, summary))
            self._draw(summary)
        if self.local:
            self.local.delete()
        if self.is_main:
            self.heartbeat.finish(self.step)
        self.bar.status("finished")
        log.info("done: %s", json.dumps(metrics))
        return summary

"""Before the first step of a run: checks, the state from which it goes on, its workdir."""

import logging
import secrets
import time

import jax

from aoe_jax.data.pipeline import train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.distributed import agree, gathered, see_the_same, together
from aoe_jax.errors import UserError
from aoe_jax.model.counts import log_run
from aoe_jax.sharding import batch_sharding, put_batch, rows_of_process
from aoe_jax.storage.files import read_json
from aoe_jax.storage.retry import patiently, twice
from aoe_jax.training.checkpoint import Checkpoints, Progress
from aoe_jax.training.local_copies import LocalCopies
from aoe_jax.training.profile import traced_of_run
from aoe_jax.training.step import new_state, train_step_on
from aoe_jax.training.workdir import (
    check_data,
    check_history,
    check_workdir,
    claim_workdir,
    read_heartbeat,
)
from aoe_jax.training.writers import check_wandb

log = logging.getLogger(__name__)


class Beginning:
    """What a run begins with. `train` calls its public methods in the order in which they stand."""

    def __init__(self, config, folder, mesh, heartbeat):
        """Takes a configuration whose `mesh` is filled in."""
        self.config, self.folder, self.workdir, self.mesh = config, folder, folder.workdir, mesh
        self.heartbeat, self.started = heartbeat, time.perf_counter()
        self.is_main = jax.process_index() == 0
        self.local = None  # the copies on the disks of the hosts

    def check(self, profile, wandb, resume_only):
        """Checks for mistakes of the user; writes nothing but token stores."""
        config, workdir, steps = self.config, self.workdir, self.config.train.steps
        self.heartbeat.beat("restoring")
        with together():
            log_run(config)
            self.checkpoints = Checkpoints(workdir)
            newest = twice(self._newest_saved, UserError) if self.is_main else 0
        self.step = gathered(newest)[0]
        if self.step:  # a network disk may show other processes this checkpoint late
            place = self.checkpoints.directory / str(self.step)
            see_the_same(self.step, lambda: self.step if place.exists() else None, place)
        with together():
            has_begun = self.step > 0 or self.checkpoints.has_figures
            check_workdir(workdir, config, has_begun)
            if config.train.init_from and not self.step:
                from aoe_jax.training.starting import check_start  # only here: formats are large

                check_start(config)  # a model in a store is copied here
            if any(source.name != "prepared" for source in config.data.sources):
                self.heartbeat.beat("preparing")  # `train.hang_timeout` does not limit this
            self.corpus = open_corpus(config.data, config.model.vocab_size)
            if has_begun:
                check_data(workdir, self.corpus)
            self.heartbeat.history = read_heartbeat(workdir)["history"] or secrets.randbits(31)
            if wandb is not None:
                check_wandb(workdir, wandb)
        agree("the configuration or data", f"{config} {self.corpus.identities}")
        self.heartbeat.beat("restoring")
        self.heartbeat.saved = self.step
        if config.checkpoint.local_path:
            history, stores = self.heartbeat.history, self.corpus.identities
            self.local = LocalCopies(workdir, config, history, stores, self.folder.nonce)
            self.step = max(self.step, self.local.newest())
        with together():
            summary, is_finished = workdir / "summary.json", False
            if self.is_main and self.step == steps:
                is_finished = patiently(f"{workdir} cannot be read", summary.exists)
            if self.step > steps or (is_finished and not resume_only):
                raise UserError(
                    f"config.train.steps={steps}: {workdir} is already at step {self.step}; raise "
                    "it to go on, or use another --workdir"
                )
            profile = profile and traced_of_run(profile, self.step, steps)
        self.is_finished = bool(gathered(is_finished)[0])
        self.traced = profile if self.is_main else range(0)

    def finish_again(self):
        """Notes the end of a run that has finished, unknown to its supervisor, as where its disk
        vanished just then; changes nothing else, and returns its `summary.json`.
        """
        with together():
            summary = read_json(self.workdir / "summary.json")
            if self.is_main:
                self.folder.check_owner()
                self.heartbeat.began = read_heartbeat(self.workdir)["began"]
                self.heartbeat.may_write = self.folder.is_in_place
                self.heartbeat.finish(self.step)
        return summary

    def _newest_saved(self):
        """The step of the newest checkpoint, else 0."""
        self.folder.check_in_place()
        steps = self.checkpoints.steps()
        what = f"the files of {self.workdir} cannot be read"
        patiently(what, lambda: check_history(self.workdir, steps))
        return max(steps, default=0)

    def restore(self):
        """Makes the first state and the first batch."""
        config, corpus, size = self.config, self.corpus, self.config.train.batch_size
        split, seq_len, seed = batch_sharding(self.mesh), config.data.seq_len, config.train.seed
        rows = rows_of_process(split, size, jax.process_index())
        self.data = train_batches(
            corpus.train, corpus.weights, seq_len, size, seed, rows, config.data.loss_mask
        )
        self.heartbeat.beat("compiling", self.step)
        self.jitted_step, abstract = train_step_on(self.mesh, config)
        self.progress = Progress()
        is_new = not self.step and not config.train.init_from
        self.heartbeat.beat("compiling" if is_new else "restoring", self.step)
        self.state = self._first_state(abstract)
        self.heartbeat.beat("restoring", self.step)
        with together():  # before anything is written
            self.batch = put_batch(split, next(self.data), size)

    def _first_state(self, abstract):
        """The state in the newest local copies or checkpoint, else of a model, else a new one."""
        config, copied = self.config, self.step
        if copied > self.heartbeat.saved:
            if found := self.local.restore(copied, abstract):
                state, self.progress, position = found
                self.data.set_state(position)
                self.data.start_prefetch()
                log.info(f"going on from the local copies of step {copied}")
                return state
            self.step = self.heartbeat.saved
            log.warning(f"the local copies of step {copied} cannot be used; back to {self.step}")
            self.heartbeat.beat("restoring", self.step)
        if self.step:
            self.step, state, self.progress = self.checkpoints.restore_newest(
                abstract, self.data, self._look_before_next_restore
            )
            self.heartbeat.saved = self.step
            log.info("going on from step %d", self.step)
            return state
        if config.train.init_from:
            from aoe_jax.training.starting import state_from_model

            return state_from_model(config, self.mesh, abstract, self.corpus.tokenizer)
        return new_state(config, abstract)

    def _look_before_next_restore(self):
        self.heartbeat.beat("restoring", self.step)  # each checkpoint has the time of hang_timeout
        self.folder.check_in_place()

    def claim_workdir(self, given):
        """Makes the workdir the run's own; `given` is the configuration as the user gave it."""
        self.heartbeat.beat("restoring", self.step)  # each phase has the time of hang_timeout
        with together():
            if self.is_main:
                self.folder.check_owner()
                what = f"--workdir={self.workdir} cannot be written"
                patiently(what, lambda: claim_workdir(self.workdir, given, self.corpus))
                self.heartbeat.began = read_heartbeat(self.workdir)["began"] or time.time()
        self.heartbeat.copied = self.local and self.local.saved
        self.heartbeat.may_write = self.folder.is_in_place

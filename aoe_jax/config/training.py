"""The groups `train` and `checkpoint`."""

from dataclasses import dataclass

from aoe_jax.config.checks import require, require_not_negative, require_positive
from aoe_jax.config.sources import absolute


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule (AdamW, linear warm-up, cosine) and reporting."""

    steps: int = 1000
    batch_size: int = 16  # sequences per step, over all processes and accumulated micro-batches
    learning_rate: float = 3e-3  # peak
    warmup_steps: int = 100
    final_learning_rate: float = 3e-4
    weight_decay: float = 0.1  # on matrices; not on norm scales and embeddings
    clip_norm: float = 1.0  # of the global gradient norm
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0  # 0: at the end only
    max_skipped: int = (
        10  # the run stops after so many updates in a row that were skipped for not being finite
    )
    init_from: str | None = (
        None  # directory of a model that the parameters start from; None: they are drawn
    )
    # The first steps, in which routers alone are updated: for a router that is drawn anew beside
    # trained experts, as aoe_jax.prune leaves it; 0: none.
    router_steps: int = 0

    def __post_init__(self):
        require_positive(
            "train",
            self,
            "steps",
            "batch_size",
            "learning_rate",
            "clip_norm",
            "accumulate",
            "log_every",
        )
        require_positive("train", self, "max_skipped")
        require_not_negative(
            "train",
            self,
            "warmup_steps",
            "final_learning_rate",
            "weight_decay",
            "seed",
            "eval_every",
            "router_steps",
        )
        require(
            self.warmup_steps < self.steps,
            "train.warmup_steps",
            self.warmup_steps,
            f"must be fewer than train.steps={self.steps}",
        )
        require(
            self.final_learning_rate <= self.learning_rate,
            "train.final_learning_rate",
            self.final_learning_rate,
            f"can't be above the peak, train.learning_rate={self.learning_rate}",
        )
        require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"must divide train.batch_size={self.batch_size}",
        )
        if self.init_from is not None:
            object.__setattr__(self, "init_from", absolute(self.init_from))

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        require(
            self.router_steps == 0 or config.experts.has_router,
            "train.router_steps",
            self.router_steps,
            f"trains routers alone, and experts.kind={config.experts.kind!r} has none; leave it at 0",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep: a checkpoint stays while any of the three asks for it."""

    every: int = 500  # steps; one is saved at the end too, and when the run is stopped
    keep: int = 2  # the newest ones
    keep_every: int = 0  # those of every so many steps; 0: none
    keep_best: int = 0  # the ones of lowest validation nll; 0: none

    def __post_init__(self):
        require_positive("checkpoint", self, "every", "keep")
        require_not_negative("checkpoint", self, "keep_every", "keep_best")
        require(
            self.keep_every % self.every == 0,
            "checkpoint.keep_every",
            self.keep_every,
            f"must be a multiple of checkpoint.every={self.every}",
        )

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        eval_every = config.train.eval_every
        require(
            self.keep_best == 0 or (eval_every > 0 and self.every % eval_every == 0),
            "checkpoint.keep_best",
            self.keep_best,
            f"needs a validation before each checkpoint: train.eval_every={eval_every} must divide "
            f"checkpoint.every={self.every}",
        )

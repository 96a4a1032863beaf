"""The groups `train` and `checkpoint`."""

from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting


@dataclass(frozen=True)
class TrainConfig(Group):
    """The optimiser, the schedule of the learning rate, and logging."""

    group = "train"

    steps: int = setting(1000, above=0)
    # Sequences per step, over all processes and accumulated micro-batches.
    batch_size: int = setting(16, above=0)
    # adamw: the paper. muon: Muon for the matrices of experts and attention, AdamW for the rest.
    optimizer: str = setting("adamw", choices=("adamw", "muon"))
    # dtype of the optimiser's first moments; bfloat16 takes half the memory.
    moments_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    # After the warm-up: cosine decay until the last step; wsd: constant, then linear decay (Hu et
    # al., arXiv 2404.06395) in the last `decay` of the steps; or constant.
    schedule: str = setting("cosine", choices=("cosine", "wsd", "constant"))
    learning_rate: float = setting(3e-3, above=0)  # the peak, at the end of the warm-up
    # The `model.d_model` for which both learning rates are given; they are multiplied by rate_width
    # / d_model. None: they are given for this model. (Initialisation depends on fan-in already.)
    rate_width: int | None = setting(None, above=0)
    # Linear warm-up of the learning rate, as a fraction of the steps.
    warmup: float = setting(0.1, at_least=0, below=1)
    decay: float = setting(0.2, above=0, below=1)  # of "wsd", as a fraction of the steps
    # Of "cosine" and "wsd"; at most `learning_rate`.
    final_learning_rate: float = setting(3e-4, at_least=0)
    # Factor of the learning rate, and so of the weight decay, for the matrices that compute scores:
    # a router, AoE's W_gate_down, or the scoring columns of whole gates.
    scoring_rate: float = setting(1.0, at_least=0)
    weight_decay: float = setting(0.1, at_least=0)  # of all matrices except embeddings
    clip_norm: float = setting(1.0, above=0)  # limit of the global norm of the gradient
    # Micro-batches per step.
    accumulate: int = setting(1, above=0, divides="batch_size")
    seed: int = setting(0, at_least=0)
    log_every: int = setting(20, above=0)
    eval_every: int = setting(0, at_least=0)  # steps between validations; 0: only at the end
    # Steps between two samples of text, in the log and in samples.jsonl; 0: no samples.
    sample_every: int = setting(0, at_least=0)
    # Skip an update whose gradient norm is this many standard deviations above the mean of about
    # 100 recent norms; 0: never. After a lasting change of norms, some tens of updates are skipped.
    skip_above: float = setting(0.0, at_least=0)
    # The run stops after this many updates in a row were skipped because they were not finite.
    max_skipped: int = setting(10, above=0)
    # After this many seconds without progress (a step, a validation batch, a save, a restore, the
    # start or the end) the run ends with exit status 6; 0: never. Compilation has no limit.
    hang_timeout: float = setting(1800.0, at_least=0)
    # Directory of a model whose parameters initialise the run; None: random parameters.
    init_from: str | None = None
    # The first `router_steps` steps update only routers. This is for models from aoe_jax.prune,
    # whose experts are trained and whose router is new.
    router_steps: int = setting(0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        self.make_absolute("init_from")

    @property
    def warmup_steps(self):
        """The number of warm-up steps, fewer than `steps`."""
        return min(round(self.warmup * self.steps), self.steps - 1)

    @property
    def decay_steps(self):
        """The number of steps with linear decay; 0 unless the schedule is "wsd"."""
        if self.schedule != "wsd":
            return 0
        return max(1, min(round(self.decay * self.steps), self.steps - self.warmup_steps))

    def check(self, config):
        kind, has_router = config.experts.kind, config.experts.has_router
        if self.schedule != "constant" and self.final_learning_rate > self.learning_rate:
            wanted = f"must be at most train.learning_rate={self.learning_rate}"
            self.refuse("final_learning_rate", wanted)
        tokens = self.batch_size // self.accumulate * config.data.seq_len
        if tokens >= 2**31:
            why = f"makes micro-batches of {tokens} tokens; they must be fewer than 2**31"
            self.refuse("batch_size", f"{why}, so raise train.accumulate")
        if self.scoring_rate != 1 and not (kind == "aoe" or has_router):
            self.refuse("scoring_rate", f"is not for experts.kind={kind!r}; leave it at 1")
        if self.router_steps and not has_router:
            wanted = f"trains routers alone, and experts.kind={kind!r} has none; leave it at 0"
            self.refuse("router_steps", wanted)


@dataclass(frozen=True)
class CheckpointConfig(Group):
    """When to save checkpoints, and which to keep: each one that a `keep` field selects is kept."""

    group = "checkpoint"

    # Steps between two checkpoints; a run also saves at its end, and when it is stopped.
    every: int = setting(500, above=0)
    # Logged steps also save a checkpoint if the newest is at least this many minutes old; 0: never.
    every_minutes: float = setting(0.0, at_least=0)
    # Seconds after which a save in the background counts as failed.
    timeout: float = setting(1200.0, at_least=1, at_most=10**6)
    keep: int = setting(2, above=0)  # number of newest checkpoints to keep
    # Keep checkpoints whose step is a multiple of this; 0: none.
    keep_every: int = setting(0, at_least=0, multiple_of="every")
    keep_best: int = setting(0, at_least=0)  # number of checkpoints with the lowest validation nll

    def check(self, config):
        eval_every = config.train.eval_every
        if self.keep_best and (not eval_every or self.every % eval_every):
            self.refuse(
                "keep_best",
                f"needs a validation before each checkpoint: train.eval_every={eval_every} must "
                f"divide checkpoint.every={self.every}",
            )

"""Configuration: frozen dataclasses with named errors, Eq. 5, and the groups of `--config.GROUP.FIELD=VALUE`.

`configs/*.py` return a `ml_collections.ConfigDict` (start from `default_config()`); `Config.from_config_dict` checks it.
"""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field

import ml_collections
from ml_collections import config_dict

from aoe_jax.checks import require, require_choice, require_not_negative, require_positive
from aoe_jax.errors import UserError
from aoe_jax.methods import (
    METHODS,
    ByAttentionConfig,
    GShardConfig,
    RoutingFreeConfig,
    SmearConfig,
    ThorConfig,
    ThresholdConfig,
    TopAnyConfig,
    UoEConfig,
)
from aoe_jax.sources import absolute, label_of, mixture_in_words, parsed_sources


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. `vocab_size` is also the size of a vocabulary that is trained on the corpus."""

    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    vocab_size: int = 4096
    max_len: int = 2048
    tie_embeddings: bool = True
    dtype: str = "bfloat16"  # of the computation; parameters, logits and loss are float32
    # What the backward pass recomputes. none; experts: all that is cheap to recompute inside the experts (of an AoE expert
    # C and x Wp are kept, of a traditional one x Wg and x Wp); layer: all but a layer's input, its scores and selection.
    remat: str = "none"
    # Layers in a step of the scan over them. A scan copies all that the backward pass needs, which CPUs are slow at: there
    # more layers at once are faster. They take longer to compile.
    unroll: int = 1
    # What checkpoints of other projects have; a model that is trained here from the start needs none of it.
    n_kv_heads: int | None = None  # heads of keys and values, each shared by several of queries; None: n_heads
    rope_base: float = 10_000.0
    rope_factors: tuple = ()  # that divide the rotary frequencies, one each; (): none (LongRoPE, arXiv 2402.13753)
    rope_scale: float = 1.0  # of rotated queries and keys (LongRoPE)
    norm: str = "rms"  # rms | layer: LayerNorm with a bias
    norm_eps: float = 1e-6
    qk_norm: bool = False  # an RMSNorm on queries and one on keys, each over all heads (OLMoE)
    attention_bias: bool = False  # of q, k, v and o
    output_bias: bool = False  # of the output projection

    def __post_init__(self):
        require_positive("model", self, "n_layers", "n_heads", "d_model", "vocab_size", "max_len", "unroll")
        require_positive("model", self, "rope_base", "rope_scale", "norm_eps")
        require(
            self.n_kv_heads is None or (self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads == 0),
            "model.n_kv_heads",
            self.n_kv_heads,
            f"must divide model.n_heads={self.n_heads}",
        )
        require(
            self.d_model % (2 * self.n_heads) == 0,
            "model.n_heads",
            self.n_heads,
            f"must divide d_model={self.d_model} into heads of even width (rotary positions turn pairs)",
        )
        frequencies = self.d_model // self.n_heads // 2
        require(
            len(self.rope_factors) in (0, frequencies)
            and all(isinstance(factor, int | float) and 0 < factor < math.inf for factor in self.rope_factors),
            "model.rope_factors",
            self.rope_factors,
            f"must be {frequencies} numbers greater than 0, one a rotary frequency, or ()",
        )
        require_choice("model.norm", self.norm, ("rms", "layer"))
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        require_choice("model.remat", self.remat, ("none", "experts", "layer"))
        require(
            self.unroll == 1 or self.remat != "layer",
            "model.unroll",
            self.unroll,
            "with remat='layer' would let the compiler merge what is computed again with what was before; set 1",
        )

    @property
    def kv_heads(self):
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads


KIND_NAMES = ("aoe", "router", "capacity", "dense", "uoe", "smear", "thor")
UNSELECTIVE_KINDS = ("dense", "smear", "thor")
SELECTION_NAMES = ("top_k", "ranked", "top_p", "expert_choice", *(name for name in METHODS if name not in KIND_NAMES))


@dataclass(frozen=True)
class ExpertsConfig:
    """A layer of experts: how they are scored, chosen, weighted and shaped."""

    # aoe | router | capacity (a router, and experts of limited room) | dense | uoe, smear, thor (see `experts/KIND.py`)
    kind: str = "aoe"
    n_experts: int = 8
    top_k: int = 2
    d_ffn: int = 512  # width of a traditional expert, or of the dense layer
    d_low: int = 32  # rank of a factorised gate (r)
    d_wide: int | None = None  # width of an expert with a factorised gate (w); None: Eq. 5
    round_to: int = 1  # Eq. 5's width is rounded to the nearest multiple
    # top_k | ranked | top_p | expert_choice | a method with a group of its own, see `methods.py`
    selection: str = "top_k"
    ranks: tuple = ()  # ranked: of the top_k experts that are taken, 0 that of highest score
    top_p: float = 0.6  # top_p: experts are taken until their probability passes this
    # expert_choice: mean number of experts per token. kind capacity: places of an expert in a sequence, as a multiple of the
    # top_k / n_experts of its tokens that come to it in perfect balance.
    capacity_factor: float = 2.0
    # top_k: softmax over the chosen scores (the paper), over all (the authors' released code), or sparsemixer, by which
    # Phi-3.5-MoE is used once trained (arXiv 2409.12136).
    gate: str = "chosen"
    router_jitter: float = (
        0.01  # sparsemixer: half of how far below the best, relatively, a score may lie and still count
    )
    # aoe: sparse: only the chosen norms carry a gradient, and those of balance.aux_tokens to a balance loss; only the chosen
    # activations are kept (exact for gate=chosen). dense: as published, the whole cache is kept. None: sparse where exact.
    score_gradient: str | None = None
    # router: Wg = Wdown Wup inside each expert (Table 2, row 3). smear, thor: experts are AoE's, and smear merges by their
    # norms.
    factorised_gate: bool = False
    large_router: bool = False  # router: about n_experts d_low d_model parameters in the router (Table 2, row 4)

    def __post_init__(self):
        require_choice("experts.kind", self.kind, KIND_NAMES)
        require_positive("experts", self, "n_experts", "top_k", "d_ffn", "d_low", "round_to")
        require_choice("experts.selection", self.selection, SELECTION_NAMES)
        require_choice("experts.gate", self.gate, ("chosen", "all", "sparsemixer"))
        require_not_negative("experts", self, "router_jitter")
        require(
            self.top_k <= self.n_experts,
            "experts.top_k",
            self.top_k,
            f"can't be greater than experts.n_experts={self.n_experts}",
        )
        self._check_ranks()
        require(0 < self.top_p < 1, "experts.top_p", self.top_p, "must lie between 0 and 1")
        require(
            0 < self.capacity_factor <= self.n_experts
            or (self.selection != "expert_choice" and self.kind != "capacity"),
            "experts.capacity_factor",
            self.capacity_factor,
            f"must lie between 0 and experts.n_experts={self.n_experts}",
        )
        require(
            self.d_wide is None or self.d_wide > 0, "experts.d_wide", self.d_wide, "must be greater than 0, or None"
        )
        if not self.low_rank:
            only = "belongs to experts with a factorised gate; set the width of the others with experts.d_ffn"
            require(self.d_wide is None, "experts.d_wide", self.d_wide, only)
            require(self.round_to == 1, "experts.round_to", self.round_to, only)
        require(
            self.round_to == 1 or self.d_wide is None,
            "experts.round_to",
            self.round_to,
            "rounds the width of Eq. 5; leave experts.d_wide at None for it",
        )
        require(
            self.selects or (self.selection, self.gate) == ("top_k", "chosen"),
            "experts.selection",
            self.selection,
            f"a {self.kind} layer selects nothing; leave selection and gate at their defaults",
        )
        require(
            self.kind != "capacity" or self.selection == "top_k",
            "experts.selection",
            self.selection,
            "has no capacity; with experts.kind='capacity' leave it at 'top_k'",
        )
        require(
            self.kind != "uoe" or self.selection in ("top_k", "top_p"),
            "experts.selection",
            self.selection,
            "isn't implemented for experts.kind='uoe'; choose one of top_k, top_p",
        )
        require(
            self.kind not in ("capacity", "uoe") or self.gate != "sparsemixer",
            "experts.gate",
            self.gate,
            f"isn't implemented for experts.kind={self.kind!r}; choose one of chosen, all",
        )
        router_only = "belongs to experts.kind='router'"
        require(
            not self.factorised_gate or self.kind in ("router", "smear", "thor"),
            "experts.factorised_gate",
            True,
            f"{router_only}, 'smear' or 'thor'",
        )
        require(not self.large_router or self.kind == "router", "experts.large_router", True, router_only)
        require(
            not (self.large_router and self.factorised_gate),
            "experts.large_router",
            True,
            "is an ablation of its own; set experts.factorised_gate=False",
        )
        require(
            self.gate == "chosen" or self.selection == "top_k",
            "experts.gate",
            self.gate,
            f"is a variant of selection top_k; {self.selection} has weights of its own, leave it at 'chosen'",
        )
        require(
            self.selection != "gshard" or self.top_k == 2,
            "experts.top_k",
            self.top_k,
            "selection gshard is for two experts per token; set 2",
        )
        require_choice("experts.score_gradient", self.score_gradient, (None, "sparse", "dense"))
        require(
            self.score_gradient is None or self.kind == "aoe",
            "experts.score_gradient",
            self.score_gradient,
            "belongs to experts.kind='aoe'; leave it at None",
        )
        require(
            self.score_gradient != "sparse" or (self.takes_k and self.gate == "chosen"),
            "experts.score_gradient",
            self.score_gradient,
            "is exact for selection top_k or ranked with gate='chosen' only, elsewhere every norm carries a gradient; use "
            "'dense'",
        )

    def _check_ranks(self):
        if self.selection != "ranked":
            require(
                self.ranks == (), "experts.ranks", self.ranks, "belongs to experts.selection='ranked'; leave it at ()"
            )
            return
        require(
            len(set(self.ranks)) == len(self.ranks) == self.top_k
            and all(type(rank) is int and 0 <= rank < self.n_experts for rank in self.ranks),
            "experts.ranks",
            self.ranks,
            f"must be experts.top_k={self.top_k} different ranks, whole numbers from 0, that of the highest score, to "
            f"{self.n_experts - 1}",
        )

    @property
    def takes_k(self):
        """Whether every token has `top_k` experts."""
        return self.selection in ("top_k", "ranked")

    @property
    def selects(self):
        """Whether experts are chosen for tokens."""
        return self.kind not in UNSELECTIVE_KINDS

    @property
    def sparse_scoring(self):
        """Whether AoE scores without a gradient and computes the chosen norms again (`score_gradient`)."""
        exact = self.takes_k and self.gate == "chosen"
        return self.kind == "aoe" and (self.score_gradient or ("sparse" if exact else "dense")) == "sparse"

    @property
    def has_router(self):
        """Whether a router scores the tokens."""
        return self.kind in ("router", "capacity")

    @property
    def low_rank(self):
        """Whether each expert's gate is factorised into Wdown Wup."""
        return self.kind == "aoe" or self.factorised_gate

    def width(self, d_model):
        """Hidden width of one expert: `d_ffn`, or with a factorised gate `d_wide`, by Eq. 5 where it is None."""
        if not self.low_rank:
            return self.d_ffn
        return self.d_wide or matched_width(d_model, self.d_ffn, self.d_low, self.round_to)

    def large_router_width(self, d_model):
        """Hidden width of the large router, so that it has about `n r d` parameters."""
        return max(1, round(self.n_experts * self.d_low * d_model / (d_model + self.n_experts)))


def matched_width(d_model, d_ffn, d_low, round_to=1):
    """Eq. 5: the width `(3 d f - r d) / (r + 2 d)` that gives an AoE expert the parameters of a traditional one."""
    exact = (3 * d_model * d_ffn - d_low * d_model) / (d_low + 2 * d_model)
    return math.floor(exact / round_to + 0.5) * round_to


@dataclass(frozen=True)
class BalanceConfig:
    """Auxiliary losses, each averaged over layers and added to the negative log-likelihood, and loss-free balancing."""

    aux_weight: float = 0.01  # alpha of L_aux (Eq. 2 and 6)
    entropy_weight: float = 0.0  # of Ent_conf, minimised (top-p; Huang et al. 2024 use 1e-4)
    aux_tokens: float = (
        1.0  # fraction of the tokens, 1 / a whole number, that the softmax in the losses is averaged over
    )
    # What f and P of L_aux are means over: the batch on all devices, of train.accumulate micro-batches each by itself; or
    # each sequence by itself, and the losses are averaged.
    aux_batch: str = "global"  # global | sequence
    z_weight: float = (
        0.0  # of the z-loss, the mean square of log sum exp of the scores; 1e-3 is usual for router logits
    )
    # Loss-free balancing (Wang et al. 2024): what a step adds to or takes from an expert's selection bias, as a fraction of
    # the standard deviation of a token's scores over experts; 0: none.
    bias_rate: float = 0.0
    # router: of the loss that couples a router's rows to its experts, see `experts/coupling.py` (the paper has 1); 0: none
    coupling_weight: float = 0.0
    coupling_alpha: float = 1.0  # of that loss: what share of its own excitation an expert may have from other rows

    def __post_init__(self):
        require_not_negative("balance", self, "aux_weight", "entropy_weight", "z_weight", "bias_rate")
        require_not_negative("balance", self, "coupling_weight", "coupling_alpha")
        require(
            self.coupling_weight > 0 or self.coupling_alpha == 1,
            "balance.coupling_alpha",
            self.coupling_alpha,
            "belongs to the loss of balance.coupling_weight; set that, or leave it at 1",
        )
        require_choice("balance.aux_batch", self.aux_batch, ("global", "sequence"))
        require(
            self.aux_batch == "global" or self.aux_weight > 0,
            "balance.aux_batch",
            self.aux_batch,
            f"is of L_aux, which balance.aux_weight={self.aux_weight} leaves out; leave it at 'global'",
        )
        require(
            0 < self.aux_tokens <= 1 and abs(1 / self.aux_tokens - self.aux_stride) < 1e-6,
            "balance.aux_tokens",
            self.aux_tokens,
            "must be 1 or a whole fraction of it, such as 0.5 or 0.125",
        )

    @property
    def aux_stride(self):
        """Every how many tokens one takes part in the balance losses."""
        return round(1 / self.aux_tokens)

    @property
    def has_loss(self):
        """Whether a balance loss sends a gradient."""
        return self.aux_weight > 0 or self.entropy_weight > 0 or self.z_weight > 0


@dataclass(frozen=True)
class DataConfig:
    """The corpora and how they are cut into sequences.

    `name` is one corpus, or several in a mixture: `SOURCE[=WEIGHT], SOURCE[=WEIGHT], ...`, where SOURCE is `NAME` or
    `NAME@PATH`. All have a weight, or none: then each counts by its size, so that one pass over the mixture is one over all.
    """

    name: str = "sotu"  # sotu | text | prepared | huggingface:OWNER/NAME | any TFDS name, or a mixture of them
    # text: a folder of .txt files; prepared: a token store; TFDS: its data_dir. In a mixture each names its own with @PATH.
    path: str | None = None
    cache: str = "~/.cache/aoe_jax"  # everything that is prepared once lies here
    # A Hugging Face tokenizer.json or a SentencePiece model; None: that of the prepared stores, or byte-level BPE trained on
    # the train splits.
    tokenizer: str | None = None
    text_field: str = "text"  # the feature of a TFDS data set that holds the text
    seq_len: int = 256
    document_mask: bool = False  # attend within a document only
    loss_mask: bool = False  # no training loss on the first token of a document, which nothing foretells

    def __post_init__(self):
        sources = parsed_sources(self.name)
        require(
            self.path is None or (len(sources) == 1 and sources[0].path is None),
            "data.path",
            self.path,
            f"leave it at None where data.name={self.name!r} names paths of its own, as NAME@PATH",
        )
        for source in sources:
            folder = {"text": "folder of .txt files", "prepared": "folder of a token store"}.get(source.name)
            if folder and not (source.path or self.path):
                if len(sources) == 1:
                    require(False, "data.path", self.path, f"name the {folder}")
                require(False, "data.name", self.name, f"name the {folder} as {source.name}@FOLDER")
        require_positive("data", self, "seq_len")
        object.__setattr__(self, "cache", os.path.abspath(os.path.expanduser(self.cache)))
        object.__setattr__(self, "name", mixture_in_words(sources))
        if self.path is not None:
            object.__setattr__(self, "path", absolute(self.path))

    @property
    def sources(self):
        """The corpora in order, each with its path; `SourceConfig`s."""
        sources = parsed_sources(self.name)
        if self.path is not None:
            sources = [dataclasses.replace(sources[0], path=self.path)]
        labels = [label_of(source) for source in sources]
        if len(set(labels)) < len(labels):
            labels = [f"{number}-{label}" for number, label in enumerate(labels, 1)]
        return tuple(dataclasses.replace(source, label=label) for source, label in zip(sources, labels, strict=True))

    @property
    def name_without_paths(self):
        """`name` as a corpus keeps it when it moves."""
        return mixture_in_words([dataclasses.replace(source, path=None) for source in parsed_sources(self.name)])


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
    max_skipped: int = 10  # the run stops after so many updates in a row that were skipped for not being finite
    init_from: str | None = None  # directory of a model that the parameters start from; None: they are drawn
    # The first steps, in which routers alone are updated: for a router that is drawn anew beside trained experts, as
    # aoe_jax.prune leaves it; 0: none.
    router_steps: int = 0

    def __post_init__(self):
        require_positive("train", self, "steps", "batch_size", "learning_rate", "clip_norm", "accumulate", "log_every")
        require_positive("train", self, "max_skipped")
        require_not_negative(
            "train", self, "warmup_steps", "final_learning_rate", "weight_decay", "seed", "eval_every", "router_steps"
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


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh, and how tokens reach their experts; see `aoe_jax/sharding.py`."""

    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = 1  # parameters and optimiser state are split over it as well
    expert: int = 1  # experts are split over it
    tensor: int = 1  # attention heads, the width of experts, and positions between them
    # ring: every device of the expert axis gets all tokens of its row; all_to_all: tokens go to their experts' devices only.
    transport: str = "ring"

    def __post_init__(self):
        require(self.data > 0 or self.data == -1, "mesh.data", self.data, "must be greater than 0, or -1 for the rest")
        require_positive("mesh", self, "fsdp", "expert", "tensor")
        require_choice("mesh.transport", self.transport, ("ring", "all_to_all"))
        require(
            self.transport == "ring" or self.expert > 1,
            "mesh.transport",
            self.transport,
            "sends rows along the expert axis; set mesh.expert, or leave it at 'ring'",
        )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    uoe: UoEConfig = field(default_factory=UoEConfig)
    top_any: TopAnyConfig = field(default_factory=TopAnyConfig)
    routing_free: RoutingFreeConfig = field(default_factory=RoutingFreeConfig)
    gshard: GShardConfig = field(default_factory=GShardConfig)
    by_attention: ByAttentionConfig = field(default_factory=ByAttentionConfig)
    smear: SmearConfig = field(default_factory=SmearConfig)
    thor: ThorConfig = field(default_factory=ThorConfig)

    @property
    def method_name(self):
        """The name of the layer kind or selection method that has a group of its own; None where neither has."""
        return next((name for name in (self.experts.kind, self.experts.selection) if name in METHODS), None)

    @property
    def method_settings(self):
        """That group; None where there is none."""
        return self.method_name and getattr(self, self.method_name)

    def __post_init__(self):
        if self.experts.kind == "uoe":
            object.__setattr__(self, "uoe", self.uoe.filled_in(self.experts.d_ffn, self.experts.top_k))
        require(
            self.data.seq_len <= self.model.max_len,
            "data.seq_len",
            self.data.seq_len,
            f"is longer than model.max_len={self.model.max_len}",
        )
        if self.experts.low_rank:
            require(
                self.experts.d_low < self.model.d_model,
                "experts.d_low",
                self.experts.d_low,
                f"must be smaller than model.d_model={self.model.d_model}, or the gate is no low-rank product",
            )

            require(
                self.experts.width(self.model.d_model) > 0,
                "experts.d_ffn",
                self.experts.d_ffn,
                f"Eq. 5 finds no width for d_low={self.experts.d_low} and round_to={self.experts.round_to}; set a larger "
                "d_ffn, or experts.d_wide",
            )
        require(
            self.balance.bias_rate == 0 or self.experts.takes_k,
            "balance.bias_rate",
            self.balance.bias_rate,
            f"biases the choice of selections top_k and ranked; leave it at 0 with {self.experts.selection}",
        )
        e = self.experts
        require(
            self.balance.coupling_weight == 0
            or (e.kind == "router" and e.n_experts > 1 and not e.factorised_gate and not e.large_router),
            "balance.coupling_weight",
            self.balance.coupling_weight,
            "couples the rows of a plain router with whole gates, of experts.kind='router' and several experts; set 0",
        )
        require(
            self.balance.coupling_weight == 0 or e.selection in ("top_k", "top_p"),
            "balance.coupling_weight",
            self.balance.coupling_weight,
            f"isn't implemented for experts.selection={e.selection!r}; choose one of top_k, top_p, or set 0",
        )
        require(
            self.experts.kind != "dense" or self.model.remat != "experts",
            "model.remat",
            self.model.remat,
            "belongs to layers of experts; use none or layer with a dense model",
        )
        stride = self.balance.aux_stride
        require(
            self.balance.aux_batch == "global" or self.data.seq_len % stride == 0,
            "balance.aux_tokens",
            self.balance.aux_tokens,
            f"with aux_batch='sequence', its denominator must divide data.seq_len={self.data.seq_len}",
        )
        self._check_methods()
        require(
            self.train.router_steps == 0 or self.experts.has_router,
            "train.router_steps",
            self.train.router_steps,
            f"trains routers alone, and experts.kind={self.experts.kind!r} has none; leave it at 0",
        )
        self._check_mesh()
        every, eval_every = self.checkpoint.every, self.train.eval_every
        require(
            self.checkpoint.keep_best == 0 or (eval_every > 0 and every % eval_every == 0),
            "checkpoint.keep_best",
            self.checkpoint.keep_best,
            f"needs a validation before each checkpoint: train.eval_every={eval_every} must divide checkpoint.every={every}",
        )
        for name in ("aux_weight", "entropy_weight", "z_weight", "bias_rate"):
            require(
                self.experts.selects or getattr(self.balance, name) == 0,
                f"balance.{name}",
                getattr(self.balance, name),
                f"a {self.experts.kind} layer has no load to balance; set it to 0",
            )

    def _check_methods(self):
        """Refuses settings of methods that aren't chosen."""
        for name, group in METHODS.items():
            settings = getattr(self, name)
            if name == self.method_name or settings == group():
                continue
            changed = (f.name for f in dataclasses.fields(group) if getattr(settings, f.name) != f.default)
            field_name = next(changed)
            what = "kind" if name in KIND_NAMES else "selection"
            of_other = f"belongs to experts.{what}={name!r}; leave it at its default"
            require(False, f"{name}.{field_name}", getattr(settings, field_name), of_other)

        for name in ("aux_weight", "entropy_weight", "z_weight"):
            require(
                self.experts.selection not in ("top_any", "routing_free") or getattr(self.balance, name) == 0,
                f"balance.{name}",
                getattr(self.balance, name),
                f"isn't tried beside what selection {self.experts.selection} has for its load; set it to 0",
            )
        if self.experts.selection == "top_any":
            self._check_top_any()
        if self.experts.kind == "smear":
            self._check_smear()

    def _check_smear(self):
        """Refuses what a decoder can't have."""
        segment, length = self.smear.segment, self.data.seq_len
        require(
            segment > 0,
            "smear.segment",
            segment,
            "merges by the mean of a whole sequence, which in a decoder knows later tokens; name the tokens of a segment",
        )
        require(
            length % segment == 0 and segment < length,
            "smear.segment",
            segment,
            f"must divide data.seq_len={length} into two segments or more: the first decides for the second",
        )
        require(
            not self.data.document_mask,
            "data.document_mask",
            True,
            "with experts.kind='smear' isn't implemented: a segment knows no documents, and would tell one of another",
        )

    def _check_top_any(self):
        """Refuses what doesn't fit the layer."""
        initial, weight, n = self.top_any.initial_experts, self.top_any.loss_weight, self.experts.n_experts
        require(
            initial is None or initial <= n,
            "top_any.initial_experts",
            initial,
            f"can't be greater than the pool, experts.n_experts={n}",
        )
        require(
            self.experts.has_router or weight == type(self.top_any).loss_weight,
            "top_any.loss_weight",
            weight,
            "belongs to experts.kind='router'; leave it at its default",
        )
        require(
            not self.experts.large_router,
            "experts.large_router",
            True,
            "isn't implemented for selection top_any, which compares tokens with the columns of the router",
        )

    def _check_mesh(self):
        """Refuses what the mesh would have to split unevenly."""
        m, e, mesh, d = self.model, self.experts, self.mesh, self.model.d_model
        merges = "would let the compiler merge what is gathered again with what was gathered before, and keep it; set 1"
        require(m.unroll == 1 or mesh.fsdp == 1, "model.unroll", m.unroll, f"with mesh.fsdp={mesh.fsdp} {merges}")
        if e.kind == "dense":
            require(mesh.expert == 1, "mesh.expert", mesh.expert, "a dense model has no experts to split; use fsdp")
        require(
            e.kind != "capacity" or mesh.expert == 1 or mesh.transport == "all_to_all",
            "mesh.transport",
            mesh.transport,
            "with experts.kind='capacity' and mesh.expert, places of experts travel; set 'all_to_all'",
        )
        require(
            e.selects or mesh.transport == "ring",
            "mesh.transport",
            mesh.transport,
            f"with experts.kind={e.kind!r} isn't tested; leave it at 'ring'",
        )
        require(
            mesh.tensor == 1 or not m.qk_norm,
            "mesh.tensor",
            mesh.tensor,
            "splits heads, which model.qk_norm spans; set 1",
        )
        splits = [
            ("expert", "experts.n_experts", e.n_experts),
            ("tensor", "model.n_heads", m.n_heads),
            ("tensor", "model.n_kv_heads", m.kv_heads),
            ("tensor", "data.seq_len", self.data.seq_len),
            ("tensor", "experts.d_wide" if e.low_rank else "experts.d_ffn", e.width(d)),
            ("fsdp", "model.d_model", d),
        ]
        if e.low_rank:
            splits.append(("fsdp", "experts.d_low", e.d_low))
        if e.kind == "uoe":
            splits.append(("tensor", "uoe.routing_neurons", self.uoe.routing_neurons))
        for axis, name, size in splits:
            hint = "; set experts.round_to to a multiple of it" if name == "experts.d_wide" else ""
            pieces = getattr(mesh, axis)
            require(size % pieces == 0, f"mesh.{axis}", pieces, f"must divide {name}={size}{hint}")
        rows, shards = self.train.batch_size // self.train.accumulate, max(mesh.data, 1) * mesh.fsdp * mesh.expert
        micro = "train.batch_size / train.accumulate" if self.train.accumulate > 1 else "train.batch_size"
        require(
            rows % shards == 0,
            "train.batch_size",
            self.train.batch_size,
            f"{micro}={rows} sequences must be divisible by mesh.data * mesh.fsdp * mesh.expert = {shards}",
        )
        local = self.data.seq_len // mesh.tensor
        require(
            shards * mesh.tensor == 1 or local % self.balance.aux_stride == 0,
            "balance.aux_tokens",
            self.balance.aux_tokens,
            f"on a mesh, every 1 / aux_tokens-th position must fall alike in each device's {local} positions of a sequence",
        )

    @classmethod
    def from_config_dict(cls, config):
        """Checks a `ConfigDict` (or nested dict) field by field.

        Raises:
          UserError: an unknown group or field, a value of the wrong type, or one that can't be.
        """
        groups = {f.name: f.type for f in dataclasses.fields(cls)}
        _refuse_unknown(dict(config), groups, "")
        return cls(
            **{name: _build(group, name, dict(config[name])) for name, group in groups.items() if name in config}
        )

    def to_dict(self):
        """Nested plain dict, as JSON gives it back."""
        groups = dataclasses.asdict(self)
        groups["model"]["rope_factors"] = list(self.model.rope_factors)
        groups["experts"]["ranks"] = list(self.experts.ranks)
        return groups


def _refuse_unknown(given, known, prefix):
    for name in given:
        if name not in known:
            raise UserError(f"config.{prefix}{name} is unknown; known are {', '.join(known)}")


def _build(group, group_name, values):
    hints = typing.get_type_hints(group)
    _refuse_unknown(values, hints, f"{group_name}.")
    return group(**{name: _typed(f"{group_name}.{name}", value, hints[name]) for name, value in values.items()})


def _typed(name, value, hint):
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if tuple in kinds and type(value) is list:  # as JSON gives it back
        return tuple(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"config.{name}={value!r}: must be of type {wanted}")
    return value


def default_config():
    """The defaults as a `ConfigDict`, for `configs/*.py` to change and the command line to override."""
    config = ml_collections.ConfigDict()
    for group in dataclasses.fields(Config):
        hints = typing.get_type_hints(group.type)
        values = ml_collections.ConfigDict()
        for f in dataclasses.fields(group.type):
            if isinstance(hints[f.name], types.UnionType):
                values[f.name] = config_dict.placeholder(typing.get_args(hints[f.name])[0])
            else:
                values[f.name] = f.default
        config[group.name] = values
    return config

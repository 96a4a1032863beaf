"""The group `experts`, and Eq. 5."""

import dataclasses
import math
from dataclasses import dataclass

from aoe_jax.config.checks import require, require_choice, require_not_negative, require_positive
from aoe_jax.config.methods import METHODS

KIND_NAMES = ("aoe", "router", "capacity", "dense", "uoe", "smear", "thor")
UNSELECTIVE_KINDS = ("dense", "smear", "thor")
# Selections by which its scores, and a selection bias, decide the experts of a token, and nothing
# else does: those that methods take which look at scores beside the choice.
BY_SCORES_ALONE = ("top_k", "top_p")
SELECTION_NAMES = (
    "top_k",
    "ranked",
    "top_p",
    "expert_choice",
    *(name for name in METHODS if name not in KIND_NAMES),
)


@dataclass(frozen=True)
class ExpertsConfig:
    """A layer of experts: how they are scored, chosen, weighted and shaped."""

    # aoe | router | capacity (a router, and experts of limited room) | dense | uoe, smear, thor
    # (see `experts/KIND.py`)
    kind: str = "aoe"
    n_experts: int = 8  # of a layer (n)
    top_k: int = 2  # experts of a token (K), where the selection has them fixed
    d_ffn: int = 512  # width of a traditional expert, or of the dense layer
    d_low: int = 32  # rank of a factorised gate (r)
    d_wide: int | None = None  # width of an expert with a factorised gate (w); None: Eq. 5
    round_to: int = 1  # Eq. 5's width is rounded to the nearest multiple
    # top_k | ranked | top_p | expert_choice | a method with a group of its own, see `methods.py`
    selection: str = "top_k"
    ranks: tuple = ()  # ranked: of the top_k experts that are taken, 0 that of highest score
    top_p: float = 0.6  # top_p: experts are taken until their probability passes this
    # expert_choice: mean number of experts per token. kind capacity: places of an expert in a
    # sequence, as a multiple of the top_k / n_experts of its tokens that come to it in perfect
    # balance.
    capacity_factor: float = 2.0
    # top_k: softmax over the chosen scores (the paper), over all (the authors' released code), or
    # sparsemixer, by which Phi-3.5-MoE is used once trained (arXiv 2409.12136).
    gate: str = "chosen"
    # sparsemixer: half of how far below the best, relatively, a score may lie and still count
    router_jitter: float = 0.01
    # aoe: sparse: only the chosen norms carry a gradient, and those of balance.aux_tokens to a
    # balance loss; only the chosen activations are kept (exact for gate=chosen). dense: as
    # published, the whole cache is kept. None: sparse where exact.
    score_gradient: str | None = None
    # router: Wg = Wdown Wup inside each expert (Table 2, row 3). smear, thor: experts are AoE's,
    # and smear merges by their norms.
    factorised_gate: bool = False
    large_router: bool = (
        False  # router: about n_experts d_low d_model parameters in the router (Table 2, row 4)
    )

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
        for name, owner in _idle_fields(self.kind, self.selection, self.gate).items():
            value, default = getattr(self, name), getattr(type(self), name)
            require(
                value == default,
                f"experts.{name}",
                value,
                f"belongs to {owner}; leave it at {default!r}",
            )
        self._check_ranks()
        require(0 < self.top_p < 1, "experts.top_p", self.top_p, "must lie between 0 and 1")
        require(
            0 < self.capacity_factor <= self.n_experts or "capacity_factor" in self.idle_fields,
            "experts.capacity_factor",
            self.capacity_factor,
            f"must lie between 0 and experts.n_experts={self.n_experts}",
        )
        require(
            self.d_wide is None or self.d_wide > 0,
            "experts.d_wide",
            self.d_wide,
            "must be greater than 0, or None",
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
            self.kind != "uoe" or self.selection in BY_SCORES_ALONE,
            "experts.selection",
            self.selection,
            f"isn't implemented for experts.kind='uoe'; choose one of {', '.join(BY_SCORES_ALONE)}",
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
        require(
            not self.large_router or self.kind == "router",
            "experts.large_router",
            True,
            router_only,
        )
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

    def check(self, config):
        """Refuses what doesn't fit the other groups."""
        if not self.low_rank:
            return
        require(
            self.d_low < config.model.d_model,
            "experts.d_low",
            self.d_low,
            f"must be smaller than model.d_model={config.model.d_model}, or the gate is no low-rank product",
        )
        require(
            self.width(config.model.d_model) > 0,
            "experts.d_ffn",
            self.d_ffn,
            f"Eq. 5 finds no width for d_low={self.d_low} and round_to={self.round_to}; set a larger d_ffn, or "
            "experts.d_wide",
        )

    def choosing(self, **changes):
        """With changes to how experts are chosen; fields that have no say in it any more are at
        their defaults.
        """
        of_choice = (
            changes.get(name, getattr(self, name)) for name in ("kind", "selection", "gate")
        )
        idle = {name: getattr(type(self), name) for name in _idle_fields(*of_choice)}
        return dataclasses.replace(self, **idle | changes)

    @property
    def idle_fields(self):
        """Fields at their defaults, for the experts are chosen in a way that doesn't go by them."""
        return tuple(_idle_fields(self.kind, self.selection, self.gate))

    def _check_ranks(self):
        if self.selection != "ranked":
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
        """Whether AoE scores without a gradient and computes the chosen norms again
        (`score_gradient`).
        """
        exact = self.takes_k and self.gate == "chosen"
        return (
            self.kind == "aoe"
            and (self.score_gradient or ("sparse" if exact else "dense")) == "sparse"
        )

    @property
    def has_router(self):
        """Whether a router scores the tokens."""
        return self.kind in ("router", "capacity")

    @property
    def low_rank(self):
        """Whether each expert's gate is factorised into Wdown Wup."""
        return self.kind == "aoe" or self.factorised_gate

    def width(self, d_model):
        """Hidden width of one expert: `d_ffn`, or with a factorised gate `d_wide`, by Eq. 5 where
        it is None.
        """
        if not self.low_rank:
            return self.d_ffn
        return self.d_wide or matched_width(d_model, self.d_ffn, self.d_low, self.round_to)

    def large_router_width(self, d_model):
        """Hidden width of the large router, so that it has about `n r d` parameters."""
        return max(1, round(self.n_experts * self.d_low * d_model / (d_model + self.n_experts)))


def _idle_fields(kind, selection, gate):
    """field -> what it belongs to, of the fields that few choices go by and this one doesn't."""
    fields = {
        "ranks": (selection == "ranked", "experts.selection='ranked'"),
        "top_p": (selection == "top_p", "experts.selection='top_p'"),
        "capacity_factor": (
            selection == "expert_choice" or kind == "capacity",
            "experts.selection='expert_choice' or experts.kind='capacity'",
        ),
        "router_jitter": (gate == "sparsemixer", "experts.gate='sparsemixer'"),
    }
    return {name: owner for name, (has_say, owner) in fields.items() if not has_say}


def matched_width(d_model, d_ffn, d_low, round_to=1):
    """Eq. 5: the width `(3 d f - r d) / (r + 2 d)` that gives an AoE expert the parameters of a
    traditional one.
    """
    exact = (3 * d_model * d_ffn - d_low * d_model) / (d_low + 2 * d_model)
    return math.floor(exact / round_to + 0.5) * round_to

"""Declares every parameter: its shape, sharding, initialisation, and whether it decays."""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn

# Initialisation preserves variance in every kind of layer: matrices have the standard deviation
# 1 / sqrt(fan_in). For tokens of unit mean square, the initial gate pre-activations have variance
# 1, both as `x W_gate` and as `(x W_gate_down) W_gate_up`. The paper does not state its
# initialisation. If all matrices had the same small standard deviation, `W_gate_down W_gate_up`
# would be many times smaller than `W_gate`. Initially AoE's norms are near sqrt(d_low). Their
# standard deviation over experts is 1 / sqrt(2); that of router logits is 1.
matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
zeros_init = nn.initializers.zeros_init()
ones_init = nn.initializers.ones_init()


@dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder, without the leading axis of stacked layers.

    Attributes:
      axes: a letter per axis, such as "n d f". `aoe_jax/moe/__init__.py` explains the letters.
      split: for each axis its logical axis in `sharding.RULES`, or None if it is not split.
      init: a Flax initialiser; None if a Flax module initialises the parameter.
      per_expert: whether a token uses only the parameters of its chosen experts.
      cast: whether every use casts the parameter to the dtype of computation.
      decays: whether weight decay applies.
    """

    axes: str
    split: tuple[str | None, ...]
    init: Callable | None = None
    per_expert: bool = False
    cast: bool = False
    decays: bool = False

    @property
    def matrix_axes(self):
        """`(axes of the inputs, axes of the outputs)` if the parameter is a matrix of an expert or
        of attention, or a stack of them; None for embeddings, norms and routers.

        Axes are counted from the end, because layers may be stacked in front.
        """
        if not (self.cast and self.decays):
            return None
        letters = self.axes.split()
        first = letters.index("n") + 1 if "n" in letters else 0
        split = first + 1 if letters[first] == "d" else len(letters) - 1
        axes = tuple(range(-len(letters), 0))
        return axes[first:split], axes[split:]

    def shape(self, sizes: dict[str, int]):
        """The shape, given `{letter: size}`. A number in `axes` is itself the size of that axis."""
        axes = self.axes.split()
        return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes)


def matrix_of_experts(axes, split, init=expert_init):
    """One matrix per expert, stacked over experts; `axes` is, for example, "n d f"."""
    return Parameter(axes, split, init, per_expert=True, cast=True, decays=True)


def vector(axes, init=None):
    """A small parameter that is not split and does not decay."""
    return Parameter(axes, (None,) * len(axes.split()), init)


EXPERTS = {
    "w_gate": matrix_of_experts("n d f", ("experts", "embed", "mlp")),
    "w_gate_down": matrix_of_experts("n d r", ("experts", "embed", None)),
    "w_gate_up": matrix_of_experts("n r f", ("experts", "rank", "mlp")),
    "w_up": matrix_of_experts("n d f", ("experts", "embed", "mlp")),
    "w_down": matrix_of_experts("n f d", ("experts", "mlp", "embed")),
}
SHARED_EXPERT = {
    "w_shared_gate": Parameter("d u", ("embed", "mlp"), matrix_init, cast=True, decays=True),
    "w_shared_up": Parameter("d u", ("embed", "mlp"), matrix_init, cast=True, decays=True),
    "w_shared_down": Parameter("u d", ("mlp", "embed"), matrix_init, cast=True, decays=True),
}
SHARED_SCALE = {"w_shared_scale": Parameter("d 1", (None, None), matrix_init, decays=True)}
ROUTER = {"w_router": Parameter("d n", (None, None), matrix_init, decays=True)}
LARGE_ROUTER = {
    "w_router_hidden": Parameter("d m", (None, None), matrix_init, decays=True),
    "w_router": Parameter("m n", (None, None), matrix_init, decays=True),
}


def _attention(axes, split, in_axis, out_axis):
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", in_axis=in_axis, out_axis=out_axis
    )
    return Parameter(axes, split, init, cast=True, decays=True)


ATTENTION = {
    "q": _attention("d H h", ("embed", "heads", None), 0, (1, 2)),
    "k": _attention("d G h", ("embed", "heads", None), 0, (1, 2)),
    "v": _attention("d G h", ("embed", "heads", None), 0, (1, 2)),
    "o": _attention("H h d", ("heads", None, "embed"), (0, 1), 2),
    "q_bias": Parameter("H h", ("heads", None), zeros_init),
    "k_bias": Parameter("G h", ("heads", None), zeros_init),
    "v_bias": Parameter("G h", ("heads", None), zeros_init),
    "o_bias": vector("d", zeros_init),
    "q_norm": Parameter("H h", ("heads", None), ones_init),
    "k_norm": Parameter("G h", ("heads", None), ones_init),
    "q_head_norm": vector("h", ones_init),
    "k_head_norm": vector("h", ones_init),
}
STACKS = ("dense_layers", "layers")  # first names of the paths of parameters with a layer axis
EMBEDDING = Parameter("V d", ("vocab", "embed"), cast=True)
DECODER = {
    "embed/embedding": EMBEDDING,
    "output/embedding": EMBEDDING,
    "final_norm/scale": vector("d"),
    "layers/attention_norm/scale": vector("d"),
    **{f"layers/attention/{name}": parameter for name, parameter in ATTENTION.items()},
    "layers/experts_norm/scale": vector("d"),
}


def shared_expert(experts):
    """The parameters of the shared expert, which processes all tokens; {} without one."""
    if not experts.d_shared:
        return {}
    return SHARED_EXPERT | (SHARED_SCALE if experts.shared_gate else {})


def matrices_of(experts):
    """The matrices of the SwiGLU experts of an `ExpertsConfig`, in the order of initialisation."""
    gate = ("w_gate_down", "w_gate_up") if experts.low_rank else ("w_gate",)
    return {name: EXPERTS[name] for name in (*gate, "w_up", "w_down")}

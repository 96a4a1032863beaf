"""AoE and MoE layers as a library: Linen modules with plain arguments around `ExpertsLayer`.

`[..., d]` below is `[B, S, d]`, `[T, d]` or any other shape whose last axis is the model width.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aoe_jax.config.experts import BalanceConfig, ExpertsConfig
from aoe_jax.config.mesh import MeshConfig
from aoe_jax.errors import UserError
from aoe_jax.methods import LAYERS
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.load_balance import LayerStats, balance_loss
from aoe_jax.moe.routing import Method, TopK, state_shapes
from aoe_jax.sharding import MESH_AXES, MeshAxes

AxisNames = str | tuple[str, ...] | None


class Aux(NamedTuple):
    """The auxiliary outputs of a layer."""

    loss: jax.Array  # [] float32: sum of weighted auxiliary losses, to be added to the model's loss
    metrics: dict[str, jax.Array]  # [] float32 each, to be logged
    stats: LayerStats  # statistics of the layer, such as the load of each expert


class _Experts(nn.Module, kw_only=True):
    """The arguments and the `__call__` that AoE and MoE share."""

    kind: ClassVar[str]

    n_experts: int
    top_k: int
    d_ffn: int
    routing: Method = TopK()
    aux_weight: float = 0.01
    z_weight: float = 0.0
    dtype: Any = None
    data: AxisNames = None
    fsdp: AxisNames = None
    expert: AxisNames = None
    tensor: AxisNames = None
    transport: str = "ring"

    @nn.compact
    def __call__(
        self, x: jax.Array, token_weights: jax.Array | None = None, training: bool = False
    ) -> tuple[jax.Array, Aux]:
        """Applies the layer.

        Args:
          x: `[..., d]`, tokens.
          token_weights: `[...]`, 0 for padding, else 1. Losses and metrics exclude padding; None
            means that there is no padding.
          training: whether to apply the training behaviour of the routing method: some methods then
            add their own losses, and some draw random numbers from `rngs={"experts": key}`.

        Returns:
          `(y [..., d], Aux)`, y in the dtype of computation. The layer also sows `Aux.loss` as
          "loss" in the collection "losses".

        Raises:
          ValueError: an argument is invalid, or does not fit the shape of x or the mesh.
        """
        x = jnp.asarray(x)
        token_weights = None if token_weights is None else jnp.asarray(token_weights)
        axes = MeshAxes(*(getattr(self, axis) for axis in MESH_AXES))
        mesh = jax.sharding.get_abstract_mesh()
        with _naming_arguments(self):
            _check_tokens(x, token_weights)
            if self.dtype is not None and not _is_floating(self.dtype):
                wanted = "must be a floating-point type of at least 16 bits, or None"
                raise ValueError(f"dtype={self.dtype!r}: {wanted}")
            balance = BalanceConfig(aux_weight=self.aux_weight, z_weight=self.z_weight)
            MeshConfig(expert=2, transport=self.transport)
            experts = self._config()
            sizes = dict(zip(MESH_AXES, axes.sizes(mesh), strict=True))
            _check_routing(self.routing, experts, balance, sizes, x.shape[-1])
            for axis in MESH_AXES if mesh.empty else ():
                if names := getattr(self, axis):
                    wanted = "there is no mesh; call the layer within jax.set_mesh(mesh)"
                    raise ValueError(f"{axis}={names!r}: {wanted}")
            if not mesh.manual_axes:
                _check_sizes(self, experts, sizes, x.shape)
        training = training and not self.is_initializing()
        layer = ExpertsLayer(
            experts=experts,
            routing=self.routing,
            balance=balance,
            dtype=self.dtype or x.dtype,
            transport=self.transport,
            training=training,
            axes=axes,
        )
        nn.share_scope(self, layer)
        with _naming_arguments(self):
            y, stats = layer(x, token_weights)
        if mesh.explicit_axes:
            y = jax.sharding.reshard(y, jax.typeof(x).sharding.spec)
        aux = _aux(layer, nn.unbox(self.variables["params"]), stats)
        if not self.is_initializing():
            self.sow("losses", "loss", aux.loss)
        return y, aux

    def _config(self):
        names = {field.name for field in fields(ExpertsConfig)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return ExpertsConfig(kind=self.kind, **given)


class AoE(_Experts, kw_only=True):
    """Autonomy-of-Experts (arXiv 2501.13074, Algorithm 2): a mixture of SwiGLU experts without a
    router. Each expert computes a few activations of every token. The L2 norm (or the maximum) of
    these activations is its score, and the `top_k` experts of highest score process the token.

        E_i(x) = (SiLU(gate_i(x)) * (x W_up_i)) W_down_i

    In the paper's form the gate is factorised, `gate_i(x) = (x W_gate_down_i) W_gate_up_i`, and the
    score is computed from `x W_gate_down_i`, of width `d_low`. With `score_neurons=s` the gate is
    whole, `gate_i(x) = x W_gate_i`, and the score is computed from its first s values.

    Attributes:
      n_experts: number of experts.
      top_k: number of experts per token.
      d_ffn: width of the experts if gates are whole; if they are factorised, width of an MoE expert
        with the same number of parameters.
      d_low: rank of a factorised gate; None: `d // 3`, where d is the model width.
      score_neurons: s, how many values of a whole gate give the score; None: factorised gates.
      score: "norm", the L2 norm as in the paper, or "max", the maximum.
      d_wide: width of an expert with a factorised gate; None: Eq. 5 computes it from `d_ffn`.
      round_to: the width of Eq. 5 is rounded to a multiple of this number.
      routing: the routing method. The default routes every token to `top_k` experts, weighted by
        the softmax over their scores. `aoe_jax.methods` has other methods.
      aux_weight: weight of the load balance loss (Eq. 2) in `Aux.loss`.
      z_weight: weight of the z-loss in `Aux.loss`.
      dtype: the dtype of computation; None: the dtype of x. Parameters are float32.
      data: names of the mesh axes that split the first axis of x.
      fsdp: names of the mesh axes that split the first axis of x, and the parameters.
      expert: names of the mesh axes that split the first axis of x, and the experts.
      tensor: names of the mesh axes that split the width of experts. They also split the second
        axis of x `[B, S, d]`, or the first axis of x `[T, d]`.
      transport: how tokens reach experts on other devices. "ring": each device receives the tokens
        of all devices along `expert`. "all_to_all": a token is sent only to its experts' devices.
    """

    kind: ClassVar[str] = "aoe"

    d_low: int | None = None
    score_neurons: int | None = None
    score: str = "norm"
    d_wide: int | None = None
    round_to: int = 1

    def _config(self):
        if None not in (self.d_low, self.score_neurons):
            wanted = f"is for factorised gates; set None with score_neurons={self.score_neurons}"
            raise ValueError(f"d_low={self.d_low}: {wanted}")
        return super()._config()


class MoE(_Experts, kw_only=True):
    """The traditional mixture of SwiGLU experts (Algorithm 1): a router, `x W_router`, scores them.

    It has the attributes of `AoE`, except `d_low`, `score_neurons`, `score`, `d_wide`, `round_to`.
    """

    kind: ClassVar[str] = "router"


def _aux(layer, weights, stats):
    """The `Aux` of an `ExpertsLayer`, from its parameters `{name: weights}` and `LayerStats`."""
    balance, losses = layer.balance, {}
    if layer.training:
        stacked = jax.tree.map(lambda a: a[None], (stats, weights))  # adds the axis of layers
        losses = layer.routing.losses(stacked[0], {}, stacked[1])
    losses["aux_loss"] = balance.aux_weight, balance_loss(stats.load, stats.mean_probability)
    if stats.z_loss is not None:
        losses["z_loss"] = balance.z_weight, stats.z_loss
    loss = sum(weight * value for weight, value in losses.values())
    load = stats.load
    share = load / jnp.maximum(load.sum(), 1e-9)
    metrics = {name: value for name, (_, value) in losses.items()} | {
        "load_entropy": jax.scipy.special.entr(share).sum(),
        "load_max_over_mean": share.max() * load.shape[0],
        "dead_experts": (load == 0).sum(dtype=load.dtype),
        "confidence_entropy": stats.confidence_entropy,
        "mean_score": stats.mean_score.mean(),
        "score_spread": stats.score_spread,
    }
    return Aux(loss, jax.lax.stop_gradient(metrics), stats)


@contextmanager
def _naming_arguments(layer):
    """Turns errors of configurations into `ValueError`s that name the arguments of the layer."""
    try:
        yield
    except (UserError, ValueError) as error:
        message = re.sub(r"(config\.)?routing\.name=", "routing=", str(error))
        message = re.sub(r"(config\.)?\b(experts|balance|routing|mesh|model)\.", "", message)
        raise ValueError(f"{type(layer).__name__}: {message}") from error


def _is_floating(dtype):
    """Whether `dtype` is floating-point with at least 16 bits; layers support no smaller types."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1


def _check_tokens(x, token_weights):
    if x.ndim < 2 or not x.size or not _is_floating(x.dtype):
        wanted = "must be floats of 16 bits or more, in two axes [T, d] or more, and not empty"
        raise ValueError(f"x is {x.dtype}{list(x.shape)}: it {wanted}")
    if token_weights is not None and token_weights.shape != x.shape[:-1]:
        wanted = f"must be that of the tokens, {x.shape[:-1]}"
        raise ValueError(f"token_weights has the shape {token_weights.shape}: it {wanted}")
    varies = getattr(jax.typeof(x), "manual_axis_type", None)
    if varies is not None and varies.varying:  # grouped_matmul does not support check_vma
        raise ValueError("the jax.shard_map around the layer needs check_vma=False")


def _check_routing(routing, experts, balance, sizes, d_model):
    named = f"routing={routing!r}"
    if not isinstance(routing, Method) or routing.name in LAYERS:
        raise ValueError(f"{named}: take a router, such as TopP() of aoe_jax.methods.top_p")
    if state_shapes(routing, experts, balance, d_model):
        wanted = "it has a state that training updates; use aoe_jax.ExpertsLayer"
        raise ValueError(f"{named}: {wanted}")
    config = SimpleNamespace(experts=experts, balance=balance, routing=routing)
    config.model, config.mesh = SimpleNamespace(d_model=d_model), MeshConfig(**sizes)
    experts.check(config)
    routing.check(config)


def _check_sizes(layer, experts, sizes, shape):
    """Raises `ValueError` for sizes that the mesh cannot split evenly."""
    if len(shape) > 3 and math.prod(sizes.values()) > 1:
        wanted = "on several devices it must be [B, S, d] or [T, d]; reshape it"
        raise ValueError(f"x has the shape {shape}: {wanted}")
    batch = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if len(shape) == 2:
        batch *= sizes["tensor"]
    elif shape[1] % sizes["tensor"]:
        raise ValueError(f"tensor={layer.tensor!r}: it must divide the second axis of x, {shape}")
    if shape[0] % batch:
        wanted = f"a multiple of the {batch} devices that tokens are split over"
        raise ValueError(f"x has the shape {shape}: its first axis must be {wanted}")
    width = experts.width(shape[-1])
    splits = [
        ("expert", "n_experts", experts.n_experts, ""),
        ("tensor", "the width of experts", width, "; set round_to" if experts.low_rank else ""),
        ("fsdp", "the width of the model", shape[-1], ""),
        ("fsdp", "d_low", experts.rank(shape[-1]) if experts.low_rank else 0, ""),
    ]
    for axis, name, size, hint in splits:
        if size % sizes[axis]:
            wanted = f"its {sizes[axis]} devices must divide {name}, {size}{hint}"
            raise ValueError(f"{axis}={getattr(layer, axis)!r}: {wanted}")
    if experts.score_neurons and experts.score_neurons > width // sizes["tensor"]:
        wanted = f"must be at most d_ffn divided by the devices along tensor, {sizes['tensor']}"
        raise ValueError(f"score_neurons={experts.score_neurons}: {wanted}")

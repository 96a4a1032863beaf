"""`experts.kind="dense"`: one SwiGLU of width `experts.d_ffn` for every token, the baseline."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from aoe_jax.config.experts import ExpertsConfig
from aoe_jax.methods.unchosen import Unchosen
from aoe_jax.moe.layer import ExpertsLayer, config_of_kind
from aoe_jax.moe.load_balance import LayerStats
from aoe_jax.moe.swiglu import single_expert
from aoe_jax.parameters import EXPERTS, matrix_init


def _without_experts(parameter):
    return dataclasses.replace(
        parameter, axes=parameter.axes[2:], split=parameter.split[1:], init=matrix_init
    )


@dataclass(frozen=True)
class Dense(Unchosen):
    """The layer without experts; its statistics are those of a single expert."""

    name = "dense"

    def __call__(self, x, weights, layer, ctx):
        devices = ctx.devices

        @jax.named_scope("experts")
        def compute(x, weights):
            return single_expert(x, layer.gathered(weights, devices))

        y = devices.without_whole_weights(compute)(devices.gather(x, "tensor"), weights)
        one, zero = jnp.ones(1), jnp.zeros(())
        return devices.sum_scatter(y, "tensor"), LayerStats(one, one, zero, one, zero)

    def parameters(self, experts):
        names = ("w_gate", "w_up", "w_down")
        return {name: _without_experts(EXPERTS[name]) for name in names}

    def check(self, config):
        super().check(config)
        if config.mesh.expert > 1:
            config.mesh.refuse("expert", "a dense model has no experts to split; use fsdp")
        if config.model.remat == "experts":
            wanted = "is for layers of experts; use 'none' or 'layer' with a dense model"
            config.model.refuse("remat", wanted)


def DenseLayer(experts: ExpertsConfig | None = None, **settings: Any) -> ExpertsLayer:
    """An `ExpertsLayer` that is one SwiGLU, without experts."""
    return ExpertsLayer(config_of_kind("dense", experts), Dense(), **settings)

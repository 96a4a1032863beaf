"""AoE and MoE as Flax NNX modules, with the arguments of the Linen modules in `aoe_jax.layers`."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from aoe_jax import layers
from aoe_jax.layers import Aux
from aoe_jax.sharding import MESH_AXES, MeshAxes


class _Experts(nnx.Module):
    linen: ClassVar[type[nn.Module]]

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, **arguments: Any):
        """Makes the parameters, float32.

        Args:
          d_model: width of the tokens.
          rngs: a key of its stream `params` initialises the parameters.
          **arguments: the attributes of the Linen module, such as `n_experts`.

        Raises:
          ValueError: an argument is invalid, or does not fit the mesh.
        """
        self.layer = self.linen(**arguments)
        self.d_model = d_model
        # The smallest tokens that the mesh splits evenly; parameters do not depend on them.
        names = (getattr(self.layer, axis) for axis in MESH_AXES)
        data, fsdp, expert, tensor = MeshAxes(*names).sizes(jax.sharding.get_abstract_mesh())
        x = jnp.zeros((data * fsdp * expert, tensor, d_model))
        for name, value in jax.jit(self.layer.init)(rngs.params(), x)["params"].items():
            is_split = isinstance(value, nn.meta.AxisMetadata)
            of_value = value.to_nnx_metadata() if is_split else {"value": value}
            setattr(self, name, nnx.Param(**of_value))

    def __call__(
        self,
        x: jax.Array,
        token_weights: jax.Array | None = None,
        training: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Applies the layer, see `aoe_jax.AoE`. Some routers draw from the stream `experts`."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has the shape {x.shape}: its last axis must be {self.d_model}")
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        has_stream = rngs is not None and ("experts" in rngs or "default" in rngs)
        keys = {"experts": rngs.experts()} if has_stream else None
        return self.layer.apply({"params": params}, x, token_weights, training, rngs=keys)


class AoE(_Experts):
    """Autonomy-of-Experts (arXiv 2501.13074): `AoE(d_model, n_experts=8, ..., rngs=rngs)`."""

    linen = layers.AoE


class MoE(_Experts):
    """The traditional mixture of experts with a router: `MoE(d_model, ..., rngs=rngs)`."""

    linen = layers.MoE

"""The kinds of layer, by `experts.kind`: subclasses of `layer.ExpertsModule`, a file each."""

from aoe_jax.experts.aoe import AoELayer
from aoe_jax.experts.capacity import CapacityLayer
from aoe_jax.experts.dense import DenseLayer
from aoe_jax.experts.router import RouterLayer
from aoe_jax.experts.smear import SmearLayer
from aoe_jax.experts.thor import ThorLayer
from aoe_jax.experts.uoe import UoELayer

LAYERS = {
    "aoe": AoELayer,
    "router": RouterLayer,
    "capacity": CapacityLayer,
    "dense": DenseLayer,
    "uoe": UoELayer,
    "smear": SmearLayer,
    "thor": ThorLayer,
}

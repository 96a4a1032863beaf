"""The kinds of layer, by `experts.kind`: subclasses of `layer.ExpertsModule`, in `layer.py` or a file of their own."""

from aoe_jax.experts.layer import AoELayer, CapacityLayer, DenseLayer, RouterLayer
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

"""Settings that the cost of a training step is measured against."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from aoe_jax.errors import UserError

# What is swept -> the name of its axis.
SWEPT = {
    "experts.n_experts": "experts",
    "experts.top_k": "experts a token, K",
    "experts.d_low": "low rank r",
    "train.batch_size": "tokens a step",
    "topology": "chips",
}


@dataclass(frozen=True)
class Sweep:
    """What a training step of each arm costs against one setting, of models as they start: nothing
    is trained for it.

    Values of `topology` are machines as in `aoe_jax.plan`, such as `v5e:4x4`. For these the step is
    traced, not run: parameters are split over all chips, and `train.batch_size` is that of a chip.
    """

    setting: str  # of SWEPT
    values: tuple
    changes: Mapping  # group -> field -> value, to the base, as those of a size
    arms: tuple[str, ...] | None = None  # None: all

    @property
    def is_topology(self):
        """Whether values are machines that aren't here, for which a step is traced."""
        return self.setting == "topology"

    def changes_at(self, value, batch_size):
        """The changes, group -> field -> value, that a value stands for; UserError where it is no
        topology.

        `batch_size` is that of the other values, or of a chip.
        """
        if self.is_topology:
            n = _chips(value)
            mesh = {"data": 1, "fsdp": n, "expert": 1, "tensor": 1, "transport": "ring"}
            return {"mesh": mesh, "train": {"batch_size": n * batch_size, "accumulate": 1}}
        group, _, name = self.setting.partition(".")
        return {group: {name: value}}

    def position(self, config):
        """Where the configuration of a value lies on the axis."""
        if self.is_topology:
            return config.mesh.fsdp
        if self.setting == "train.batch_size":
            return config.tokens_per_step
        group, _, name = self.setting.partition(".")
        return getattr(getattr(config, group), name)


def _chips(topology):
    shape = str(topology).partition(":")[2]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"topology={topology!r}: must be a kind of chip and a shape, such as v5e:4x4"
        )
    return math.prod(int(n) for n in shape.split("x"))

"""`experts.kind="dense"`: the baseline without experts.

t tokens of a device, d model width.
"""

import jax
import jax.numpy as jnp

from aoe_jax.experts.balance import LayerStats
from aoe_jax.experts.layer import ExpertsModule, matrix_init
from aoe_jax.experts.swiglu import one_expert


class DenseLayer(ExpertsModule):
    """One SwiGLU of width `d_ffn` for every token: the baseline. Its statistics are those of one
    expert.
    """

    selects = False

    def weights(self, d):
        """name -> `(initializer, shape)`."""
        width = self.config.d_ffn
        shapes = {"w_g": (d, width), "w_p": (d, width), "w_o": (width, d)}
        return {name: (matrix_init, shape) for name, shape in shapes.items()}

    def process(self, devices, x, given, weights):
        """`x [t, d]` -> `([t, d], LayerStats, per-token values)`."""

        @jax.named_scope("experts")
        def expert(x, weights):
            w = {name: devices.gather_weight(name, a, self.dtype) for name, a in weights.items()}
            return one_expert(x, w)

        y = devices.without_whole_weights(expert)(devices.gather(x, "tensor"), weights)
        one, zero = jnp.ones(1), jnp.zeros(())
        stats = LayerStats(
            load=one,
            mean_probability=one,
            confidence_entropy=zero,
            mean_score=one,
            score_spread=zero,
        )
        return devices.sum_scatter(y, "tensor"), stats, None

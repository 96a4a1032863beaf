"""Rows and values moved by index, with gathers both ways."""

import jax
import jax.numpy as jnp

NOWHERE = jnp.iinfo(jnp.int32).max  # an index that is out of range of every array


# Autodiff turns a gather into a scatter-add, which is slow everywhere; here no element is taken
# twice, so the derivative is a gather by the inverse index.
@jax.custom_vjp
def permute(values, index, inverse):
    """`values[index]` along the first axis, `[M, ...] -> [N, ...]`; zero for an index out of range.

    `index [N]` int32 has each number below M at most once. `inverse [M]` int32 says where each
    element of `values` is in the result; it is out of range if the element is not there.
    """
    return values.at[index].get(mode="fill", fill_value=0)


permute.defvjp(
    lambda values, index, inverse: (permute(values, index, inverse), (index, inverse)),
    lambda residuals, g: (permute(g, *reversed(residuals)), None, None),
)

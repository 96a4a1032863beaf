"""The k-th largest score of each expert over the tokens of all devices."""

import jax
import jax.numpy as jnp
import numpy as np

_SIGN = np.uint32(1 << 31)


def largest_of_rank(values, counts, rank, total):
    """The `rank`-th largest value of each column, over the rows of all devices that count.

    `values [T, n]` float32, `counts [T]` bool, `rank []` -> `[n]`; NaN if fewer rows count. Finds
    the result bit by bit, from numbers of larger values, so no device needs all rows. `total` sums
    over devices.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    # Unsigned integers in the order of the values; 0 is less than any of them.
    ordered = jnp.where(bits & _SIGN, ~bits, bits | _SIGN)
    ordered = jnp.where(counts[:, None], ordered, 0)

    def with_bit(i, found):
        longer = found | (_SIGN >> i.astype(jnp.uint32))
        number = total((ordered >= longer).sum(axis=0, dtype=jnp.int32))
        return jnp.where(number >= rank, longer, found)

    found = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(values.shape[1], jnp.uint32))
    return jax.lax.bitcast_convert_type(
        jnp.where(found & _SIGN, found ^ _SIGN, ~found), jnp.float32
    )

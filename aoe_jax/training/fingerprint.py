"""Fingerprints of arrays: what a checkpoint's bytes must come to when they are read again, over
whatever mesh.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def fingerprints(tree):
    """A 32-bit fingerprint of every array, by its path.

    The sum, modulo 2^32, of a hash of each element's bits and place. For a place the hash is one to
    one, so that another element always changes the sum; the order of summation, hence the sharding,
    doesn't. Storage formats compress arrays without a checksum of what comes out.

    Args:
      tree: nested dicts, tuples and dataclasses of arrays of 8, 16 or 32 bits an element.

    Returns:
      A dict from path to an int, the same in every process.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sharding = leaves[0][1].sharding
    everywhere = (
        NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, NamedSharding)
        else sharding
    )
    sums = jax.device_get(_jitted(everywhere)([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path): int(value)
        for (path, _), value in zip(leaves, sums, strict=True)
    }


@cache
def _jitted(sharding):
    return jax.jit(lambda arrays: jnp.stack([_sum(a) for a in arrays]), out_shardings=sharding)


def _sum(a):
    bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")).astype(
        jnp.uint32
    )
    place, stride = jnp.zeros(a.shape, jnp.uint32), 1
    for axis in reversed(range(a.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= a.shape[axis]
    # Multiplications by odd numbers and shifted exclusive ors, as in the finalisers of MurmurHash,
    # have inverses.
    mixed = bits * (2 * place + 1) + place
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

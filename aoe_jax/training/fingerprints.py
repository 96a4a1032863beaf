"""Fingerprints of arrays, to detect damage on a disk and wrong computations."""

from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aoe_jax.distributed import gathered
from aoe_jax.errors import MachineFault


def by_path(tree):
    """The leaves of a tree by their paths in text."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def fingerprints(tree):
    """The 32-bit fingerprints of arrays of 8, 16 or 32 bits an element, by their paths in the tree.

    A fingerprint is the sum, modulo 2^32, of a hash of each element's bits and index. For a given
    index the hash is one to one, so a change of one element always changes the sum. It depends
    neither on the sharding nor on the process. Storage formats have no checksum of what they
    decompress.
    """
    arrays = by_path(tree)
    leaves = list(arrays.values())
    sharding = leaves[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    sums = jax.device_get(_jitted(sharding)(leaves))
    return dict(zip(arrays, sums.tolist(), strict=True))


@cache
def _jitted(sharding):
    return jax.jit(lambda arrays: jnp.stack([_sum(a) for a in arrays]), out_shardings=sharding)


def _sum(a):
    unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(a, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros(a.shape, jnp.uint32), 1
    for axis in reversed(range(a.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= a.shape[axis]
    # Products with odd numbers and shifted exclusive ors are invertible; see the finalisers of
    # MurmurHash.
    mixed = bits * (2 * index + 1) + index
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def local_fingerprints(tree):
    """The fingerprints of the pieces of arrays that are on the devices of this process."""
    pieces = [piece.data for leaf in jax.tree.leaves(tree) for piece in leaf.addressable_shards]
    return jax.device_get([_sum_of_piece(piece) for piece in pieces])


def _sum_of_piece(piece):
    # Its device is not all of the mesh of the run.
    with jax.set_mesh(Mesh([piece.device], "piece")):
        return _sum_of_one(piece)


_sum_of_one = jax.jit(_sum)


def check_repetition(step, first, state):
    """Compares the state after a step with the `local_fingerprints` of its first computation. If
    the two differ in some processes, every process raises `MachineFault`, which names them.
    """
    differs = first != local_fingerprints(state)
    if differing := [process for process, value in enumerate(gathered(differs)) if value]:
        raise MachineFault(
            f"step {step} had two results, which differ in process "
            f"{', '.join(map(str, differing))}: a machine computes wrongly, or the program is not "
            "deterministic (on GPUs set XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
        )

"""Attention by the splash kernels of JAX (Pallas), for TPU; interpreted on CPU."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from aoe_jax.errors import UserError
from aoe_jax.model.attention.blocks import KEPT_ATTENTION
from aoe_jax.sharding import target_device

DTYPES = ("bfloat16", "float32")
LANES = 128  # positions are padded to a multiple of this
MAX_BLOCK = 512  # positions of a block of queries or keys
LONG = 8192  # sequences from this length on have blocks of twice as many, to read keys less often


def splash_attention(q, k, v, segment_ids=None):
    """`causal_attention` by the splash kernels. Raises `UserError` for dtypes not in `DTYPES`."""
    if q.dtype not in DTYPES:
        raise UserError(f"attention backend='splash' with {q.dtype}: use {' or '.join(DTYPES)}")
    length = q.shape[2]
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    # Padding lies after all positions, so no position attends to it.
    padding = -length % LANES
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, padding), (0, 0))) for a in (q, k, v))
    attend = _kernel(q.shape[1], length + padding, q.shape[-1])
    if segment_ids is None:
        y = jax.vmap(attend)(q, k, v)
    else:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        y = jax.vmap(
            lambda q, k, v, ids: attend(q, k, v, segment_ids=kernels.SegmentIds(ids, ids))
        )(q, k, v, segment_ids)
    return y[:, :, :length]


def block_size(length):
    """The largest multiple of `LANES` that divides `length`, up to `MAX_BLOCK`, or twice that from
    `LONG` on.
    """
    largest = MAX_BLOCK if length < LONG else 2 * MAX_BLOCK
    return max(size for size in range(LANES, largest + 1, LANES) if length % size == 0)


# Products of [block, block] by [block, h] for each pair of blocks.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_cost(name, operands, results):
    """The cost of a kernel, as `aoe_jax.planning.costs.Program` takes it; None for other kernels.

    A block of queries meets the blocks of keys that are not entirely in its future, so it reads
    only a part of the keys; in `dkv` a block of keys reads a part of the queries. The mask, which
    is the first operand, has a number for each pair of blocks. Heads narrower than `LANES` leave a
    part of the matrix unit idle.
    """
    kind = name.removeprefix("splash_mha_").split("_")[0]
    if not name.startswith("splash_mha_") or kind not in _PRODUCTS:
        return None
    q, k, v, *others = (a for a in operands if len(a.dims) >= 3 and a.dtype[0] in "bf")
    *_, n_heads, length, width = q.dims
    if length < LANES:  # heads narrower than that are transposed
        length, width = width, length
    n_q, n_kv = operands[0].dims[-2:]
    n_met = sum(-(-n_kv * (i + 1) // n_q) for i in range(n_q))  # pairs of blocks
    share = n_met / (n_q if kind == "dkv" else n_kv)
    if kind == "dkv":
        once, again = (k, v), (q, *others)
    else:
        once, again, share = (q, *others), (k, v), share * n_heads / k.dims[-3]
    traffic = sum(a.hbm_bytes for a in (*once, *results)) + share * sum(a.hbm_bytes for a in again)
    pairs = math.prod(q.dims[:-2]) * length**2 * n_met / (n_q * n_kv)
    occupied = -(-width // LANES) * LANES
    return 2 * _PRODUCTS[kind] * pairs * width, traffic, 2 * _PRODUCTS[kind] * pairs * occupied


def _kernel(n_heads, length, width):
    size = block_size(length)
    # Narrow heads have positions in their last axis, or they would be padded to LANES.
    layout = kernels.QKVLayout.SEQ_MINOR if width < LANES else kernels.QKVLayout.HEAD_DIM_MINOR
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * n_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT_ATTENTION,
        interpret=target_device().platform == "cpu",
    )

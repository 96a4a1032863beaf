"""Attention by the splash kernels of JAX (Pallas), for TPU; interpreted on CPU."""

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
LONG = 8192  # From this length on, blocks are up to twice as large, to load keys less often.


def splash_attention(q, k, v, segment_ids=None):
    """`causal_attention` by the splash kernels. Raises `UserError` for dtypes not in `DTYPES`."""
    if q.dtype not in DTYPES:
        raise UserError(f"attention backend='splash' with {q.dtype}: use {' or '.join(DTYPES)}")
    length = q.shape[2]
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    # Padding is after all positions, so no position attends to it.
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
    """The largest allowed block that divides `length`, a multiple of `LANES`."""
    largest = MAX_BLOCK if length < LONG else 2 * MAX_BLOCK
    return max(size for size in range(LANES, largest + 1, LANES) if length % size == 0)


def _kernel(n_heads, length, width):
    size = block_size(length)
    # For narrow heads positions are the last axis, because the last axis is padded to LANES.
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

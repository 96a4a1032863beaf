"""Attention by cuDNN, for NVIDIA GPUs from Ampere on."""

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError

DTYPES = ("bfloat16", "float16")
MAX_WIDTH = 128  # the widest head that all generations support; Hopper and later support 256


def check(dtype, head_width):
    """Raises `UserError` for a dtype or a width of heads that cuDNN does not support."""
    if jnp.dtype(dtype) not in DTYPES:
        raise UserError(
            f"attention backend='cudnn' with {jnp.dtype(dtype)}: use {' or '.join(DTYPES)}"
        )
    if head_width % 8 or head_width > MAX_WIDTH:
        raise UserError(
            f"attention backend='cudnn' with heads of width {head_width}: use a multiple of 8 up "
            f"to {MAX_WIDTH}"
        )


def is_cudnn_forward(primitive, *_, **params):
    """A checkpoint policy that keeps the results of the forward kernel, which have no name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def cudnn_attention(q, k, v, segment_ids=None):
    """The backend "cudnn" of `causal_attention`, with its arguments.

    `segment_ids` need a mask `[B, 1, S, S]`, which costs time and memory. Raises like `check`.
    """
    check(q.dtype, q.shape[-1])
    length = q.shape[2]
    padding = length % 2  # the kernel needs an even length; no position attends to the padding
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, padding), (0, 0))) for a in (q, k, v))
    mask = None
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return y.swapaxes(1, 2)[:, :, :length]

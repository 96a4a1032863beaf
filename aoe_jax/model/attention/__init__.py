"""Causal softmax attention by backends with the same signature, one per file.

    blocks     plain JAX, for all platforms
    splash     JAX's Pallas kernels for TPU; interpreted on CPU
    cudnn      cuDNN, for NVIDIA GPUs from Ampere on
    reference  computes the whole matrix of scores; for tests and the doctor

`aoe_jax/moe/__init__.py` lists the letters in shapes.
"""

import logging
import re
from functools import lru_cache, partial
from importlib import import_module

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError
from aoe_jax.sharding import target_device


def _import_and_attend(name, *arrays):
    """Calls the function `NAME_attention` of the module `NAME` in this package."""
    return getattr(import_module(f"{__name__}.{name}"), f"{name}_attention")(*arrays)


BACKENDS = {name: partial(_import_and_attend, name) for name in ("blocks", "splash", "cudnn")}
PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}  # "blocks" runs on all platforms
_WITHOUT_CUDNN = re.compile(r"\b(V100|T4|P100|P40|P4|K80|RTX 20\d0|GTX|TITAN|Quadro)\b")


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention of each position to itself and the positions before it.

    Scores are scaled by `1 / sqrt(h)`. Scores and sums are float32 or wider.

    Args:
      q: `[B, H, S, h]`, floating-point.
      k, v: `[B, G, S, h]` in the dtype of `q`; G divides H.
      segment_ids: `[B, S]` int32 document numbers, or None; attention stays within a document.
      backend: one of `BACKENDS`, or "auto", which chooses by dtype, h and devices: those of the
        mesh in context (`jax.set_mesh`, `jax.shard_map`), else those of this process.

    Returns:
      `[B, H, S, h]`, dtype of `q`. Differentiable in q, k and v in reverse mode. Further arrays
      of the backward pass have the checkpoint name `KEPT_ATTENTION`, except with cuDNN.

    Raises:
      UserError: if the backend is unknown or does not support the platform, dtype or head width.
      ValueError: if shapes or dtypes do not fit together.
    """
    n_kv = k.shape[1] if q.ndim == k.ndim == 4 and q.size else 0
    fits = n_kv and k.shape == v.shape == (q.shape[0], n_kv, *q.shape[2:]) and not q.shape[1] % n_kv
    fits = fits and q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)
    if not fits or (segment_ids is not None and segment_ids.shape != (q.shape[0], q.shape[2])):
        given = [f"{a.dtype}{a.shape}" for a in (q, k, v, segment_ids) if a is not None]
        raise ValueError(
            "causal_attention wants q [B, H, S, h] and k, v [B, G, S, h] of one floating-point "
            "dtype, G a divisor of H, and no axis empty; segment_ids are [B, S] or None; got "
            f"{', '.join(given)}"
        )
    if backend == "auto":
        backend = backend_for(target_device(), q.dtype, q.shape[3])
    if backend not in BACKENDS:
        raise UserError(
            f"attention backend={backend!r} is unknown; use auto, {' or '.join(BACKENDS)}"
        )
    platform = target_device().platform
    if platform not in PLATFORMS.get(backend, (platform,)):
        raise UserError(
            f"attention backend={backend!r} does not run on platform {platform!r}; use auto"
        )
    return BACKENDS[backend](q, k, v, segment_ids)


@lru_cache
def backend_for(device, dtype, head_width):
    """The backend that "auto" selects for a `Device`, or for the `AbstractDevice` of a mesh."""
    backend, log = "blocks", logging.getLogger(__name__)
    if device.platform == "tpu":
        backend = "splash"
    elif device.platform == "gpu" and _is_ampere_or_later(device):
        from aoe_jax.model.attention.cudnn import check as check_cudnn

        try:
            check_cudnn(dtype, head_width)
            backend = "cudnn"
        except UserError as error:
            log.warning("%s. This run uses backend 'blocks', which is slower", error)
    log.info("attention backend on %s: %s", device.device_kind, backend)
    return backend


def _is_ampere_or_later(device):
    capability = getattr(device, "compute_capability", None)
    if capability is None:  # an AbstractDevice has only a name
        return not _WITHOUT_CUDNN.search(device.device_kind)
    return str(capability)[0].isdigit() and float(capability) >= 8  # AMD reports gfx90a or similar

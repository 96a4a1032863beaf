"""Grouped matmul: multiplies rows in expert order by their experts' weights; one file per backend.

Letters of shapes in this package: M rows, D contracted width, F output width, E experts.
"""

import logging
import re
from functools import lru_cache, partial
from importlib import import_module

import jax
import jax.numpy as jnp

from aoe_jax.errors import UserError
from aoe_jax.moe.grouped_matmul.blocked import RowLayout, layout_matmul
from aoe_jax.moe.grouped_matmul.blocked import row_layout as blocked_row_layout
from aoe_jax.moe.grouped_matmul.groups import PaddedGroups, WholeGroups, group_sizes_of
from aoe_jax.sharding import target_device

log = logging.getLogger(__name__)


def _import_and_multiply(name, rows, weights, groups):
    """Calls the function `NAME_matmul` of the module `NAME` in this package."""
    module = import_module(f"{__name__}.{name}")
    return getattr(module, f"{name}_matmul")(rows, weights, groups)


_NAMES = ("blocked", "rowwise", "ragged", "megablox", "mosaic_gpu")
BACKENDS = {name: partial(_import_and_multiply, name) for name in _NAMES}


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    groups: jax.Array | WholeGroups | PaddedGroups | RowLayout,
    *,
    backend: str = "auto",
) -> jax.Array:
    """Multiplies each group of rows with its expert's weights.

    Args:
      rows: `[M, D]`, floating-point; the first `groups[0]` rows belong to expert 0, and so on.
      weights: `[E, D, F]`, same dtype as `rows`.
      groups: `[E]` int32, the row count of each expert, with a sum of at most M; or `WholeGroups`,
        whose sum is M; or `PaddedGroups`; or a `RowLayout` from `row_layout`: then rows and result
        are in that layout, M is its length, and positions without a row contain zeros.
      backend: `"blocked"` (plain JAX, a batched product and blocks of rows), `"rowwise"` (plain
        JAX, for fewer rows than experts), `"megablox"` (TPU; interpreted on CPU), `"mosaic_gpu"`
        (Hopper), `"ragged"` (`jax.lax.ragged_dot`, dense on most platforms: a baseline) or
        `"auto"`, which chooses by M, the dtype and the devices of the mesh in context
        (`jax.set_mesh`, `jax.shard_map`) or, without a mesh, of this process.

    Returns:
      `[M, F]`, dtype of `rows`, accumulated in float32 at least; rows past the last group are
      zero, but undefined with `PaddedGroups`. Differentiable in `rows` and `weights`.

    Raises:
      UserError: if the backend is unknown or does not support the dtype.
      ValueError: if shapes or dtypes do not fit together.
    """
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            "grouped_matmul wants rows [M, D], weights [E, D, F]; "
            f"got {rows.shape}, {weights.shape}"
        )
    if isinstance(groups, RowLayout):
        return layout_matmul(rows, weights, groups)
    sizes = group_sizes_of(groups)
    if sizes.shape != weights.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.signedinteger):
        wanted = f"int32[{weights.shape[0]}]"
        got = f"{sizes.dtype}{list(sizes.shape)}"
        raise ValueError(f"grouped_matmul wants group sizes {wanted}; got {got}")
    if rows.dtype != weights.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            "grouped_matmul wants one floating-point dtype; rows are "
            f"{rows.dtype}, weights {weights.dtype}"
        )
    if not rows.size or not weights.size:
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    if backend == "auto":
        backend = backend_for(target_device(), rows.dtype, rows.shape[0], weights.shape[0])
    if backend not in BACKENDS:
        raise UserError(
            f"grouped_matmul backend={backend!r} is unknown; use auto, {' or '.join(BACKENDS)}"
        )
    return BACKENDS[backend](rows, weights, groups)


def is_megablox(rows, weights, groups, backend):
    """Whether `grouped_matmul` uses Megablox for these arguments."""
    if isinstance(groups, RowLayout) or not rows.size or rows.dtype not in ("bfloat16", "float32"):
        return False
    if backend == "auto":
        backend = backend_for(target_device(), rows.dtype, rows.shape[0], weights.shape[0])
    return backend == "megablox"


def backend_for(device, dtype, m, n_experts):
    """The backend that `"auto"` selects on a device for m rows."""
    backend = _that_takes(_default_backend(device), dtype)
    if backend == "blocked" and m < n_experts:  # rowwise loads no weights of unused experts
        backend = "rowwise"
    return backend


def row_layout(group_sizes, m, backend, dtype):
    """The `RowLayout` that a backend or `"auto"` needs for m rows; None: rows in expert order."""
    if m < group_sizes.shape[0]:  # "auto" selects rowwise
        return None
    if backend == "auto":
        backend = _that_takes(_default_backend(target_device()), dtype)
    return blocked_row_layout(group_sizes, m) if backend == "blocked" else None


@lru_cache
def _default_backend(device):
    backend = "mosaic_gpu" if _is_hopper(device) else "blocked"
    if device.platform == "tpu":
        backend = "megablox"
    log.info(f"grouped_matmul backend on {device.device_kind}: {backend}")
    return backend


def _is_hopper(device):
    capability = getattr(device, "compute_capability", None)
    if capability is None:  # an AbstractDevice has only a name, such as H100, H800 or GH200
        return device.platform == "gpu" and re.search(r"\bG?H\d", device.device_kind) is not None
    return str(capability).startswith("9.")


@lru_cache
def _that_takes(backend, dtype):
    """`backend`, or "blocked", with a warning, if `backend` does not support the dtype."""
    if backend in ("megablox", "mosaic_gpu"):
        try:
            import_module(f"{__name__}.{backend}").check(dtype)
        except UserError as error:
            log.warning(f"{error}. This run uses backend 'blocked', which is slower")
            return "blocked"
    return backend

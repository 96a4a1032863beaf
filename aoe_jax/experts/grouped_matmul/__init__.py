"""Grouped matmul: rows in expert order, each group times its own expert's weights. One signature, one backend a file.

M rows, D contracted width, F output width, E experts.
"""

import logging
from functools import lru_cache

import jax

from aoe_jax.errors import UserError
from aoe_jax.experts.grouped_matmul.blocked import blocked_matmul
from aoe_jax.experts.grouped_matmul.ragged import ragged_matmul

BACKENDS = {"blocked": blocked_matmul, "ragged": ragged_matmul}


def grouped_matmul(rows, weights, group_sizes, *, backend="auto"):
    """Multiplies each group of rows with its expert's weights.

    Args:
      rows: `[M, D]`, the first `group_sizes[0]` rows belong to expert 0, and so on.
      weights: `[E, D, F]`, same dtype as `rows`.
      group_sizes: `[E]` int32, with a sum of at most M.
      backend: `"blocked"` (plain JAX, row blocks in expert order), `"ragged"` (`jax.lax.ragged_dot`, dense on most
        platforms: a baseline) or `"auto"`.

    Returns:
      `[M, F]`, dtype of `rows`, accumulated in float32 at least; rows past `sum(group_sizes)` are zero. Differentiable
      in `rows` and `weights`.

    Raises:
      UserError: unknown backend.
      ValueError: shapes or dtypes that don't fit together.
    """
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(f"grouped_matmul wants rows [M, D], weights [E, D, F]; got {rows.shape}, {weights.shape}")
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(f"grouped_matmul wants group_sizes [{weights.shape[0]}]; got {group_sizes.shape}")
    if rows.dtype != weights.dtype:
        raise ValueError(f"grouped_matmul wants one dtype; rows are {rows.dtype}, weights {weights.dtype}")
    if backend == "auto":
        backend = _default_backend(jax.default_backend())
    if backend not in BACKENDS:
        raise UserError(f"grouped_matmul backend={backend!r} is unknown; use auto, {' or '.join(BACKENDS)}")
    return BACKENDS[backend](rows, weights, group_sizes)


@lru_cache
def _default_backend(platform):
    backend = "blocked"
    logging.getLogger(__name__).info("grouped_matmul backend on %s: %s", platform, backend)
    return backend

"""Cheaper ways to find the K experts of largest norm, for `benchmarks.selection`; none of them is
part of the library.

A method estimates the norms of all experts. Either the estimates decide, or they keep some
candidates, whose exact norms decide. In both cases only the choice is approximate: sparse scoring
computes the activations and norms of the chosen experts again.

s sketched rank (s < r), M candidates; other letters: see `aoe_jax/moe/__init__.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aoe_jax.moe.dispatch import Local
from aoe_jax.moe.grouped_matmul import grouped_matmul
from aoe_jax.moe.parallel.collectives import Devices
from aoe_jax.moe.routing import top_k as choose_top_k
from aoe_jax.moe.scoring import activation_norms, scores_of_all


class Approximation(NamedTuple):
    """One way to choose."""

    # `(w_gate_down [n, d, r], directions)` -> the second argument of `estimate`; at every update.
    prepare: Callable[[jax.Array, Any], Any]
    estimate: Callable[[jax.Array, Any], jax.Array]  # (x [T, d], prepared) -> norms [T, n]
    # `(w_gate_down, covariance of the tokens [d, d])` -> directions to project on, found now and
    # then; None: there are none.
    find: Callable[[jax.Array, jax.Array], Any] = lambda w_gate_down, covariance: None
    operations: float = 1.0  # cost of the estimates, relative to exact scoring
    # Of one operation: 1/2 in 8 bits, which accelerators multiply twice as fast as bfloat16.
    operation_cost: float = 1.0
    candidates: int | None = None  # per expert chosen; None: the estimates decide


def choice_scores(method, x, w_gate_down, prepared, top_k, bias=None):
    """Scores `[T, n]` to choose the `top_k` by: the estimates, or the exact norms of the candidates
    and -inf for other experts. `x` is `[T, d]`, `w_gate_down` `[n, d, r]`, `prepared` the result of
    `method.prepare`, and `bias` `[n]` that of loss-free balancing, added to the scores, or None.
    """
    estimates = method.estimate(x, prepared)
    if method.candidates is None:
        return estimates
    n_experts = estimates.shape[1]
    candidates = choose_top_k(estimates, min(method.candidates * top_k, n_experts), bias=bias)
    transport = Local(Devices(), n_experts, all_used=True)
    round = transport.schedule(candidates)
    rows, groups = transport.dispatch(x, round)
    code = grouped_matmul(rows, w_gate_down, groups)
    exact_norms = transport.slot_values(activation_norms(code), round, candidates.token.shape[0])
    scores = jnp.full_like(estimates, -jnp.inf)
    return scores.at[candidates.token, candidates.expert].set(exact_norms, unique_indices=True)


def relative_cost(method, n_experts, top_k):
    """The cost of `choice_scores`, relative to the FLOPs of exact scoring."""
    return method.operations * method.operation_cost + (method.candidates or 0) * top_k / n_experts


def agreement(chosen, other):
    """`(overlap [T], identical [T])` of two choices `[T, K]` of experts: the share of a token's K
    experts that both have, and whether they have the same set.
    """
    overlap = (chosen[:, :, None] == other[:, None, :]).sum(axis=(1, 2)) / chosen.shape[1]
    return overlap, overlap == 1


def exact():
    """float32 scoring, to which the others are compared."""
    return Approximation(lambda w_gate_down, _: w_gate_down, scores_of_all)


def bfloat16():
    """Operands rounded to bfloat16, sums in float32."""

    def estimate(x, w):
        c = jnp.einsum("td,ndr->tnr", x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)
        return activation_norms(c)

    return Approximation(lambda w_gate_down, _: w_gate_down.astype(jnp.bfloat16), estimate)


def int8():
    """Operands of 8 bits, one scale per token and per column of each expert, sums in int32."""
    return _scaled(lambda a: jnp.round(a).astype(jnp.int8), 127.0, jnp.int32)


def float8():
    """Operands in float8 (e4m3), scales as in `int8`, sums in float32."""
    return _scaled(
        lambda a: a.astype(jnp.float8_e4m3fn), float(jnp.finfo(jnp.float8_e4m3fn).max), jnp.float32
    )


def _scaled(rounded, largest, accumulator):
    """Operands divided by scales so that the largest of each token and column is `largest`, then
    `rounded`.
    """

    def quantise(a):
        scale = jnp.max(jnp.abs(a), axis=1, keepdims=True) / largest
        scale = jnp.where(scale > 0, scale, 1)
        return rounded(a / scale), scale

    def estimate(x, prepared):
        w, w_scale = prepared
        x, x_scale = quantise(x)
        c = jnp.einsum("td,ndr->tnr", x, w, preferred_element_type=accumulator)
        return activation_norms(c.astype(jnp.float32) * w_scale[:, 0]) * x_scale

    return Approximation(lambda w_gate_down, _: quantise(w_gate_down), estimate, operation_cost=0.5)


def random_projection(r, s, candidates=None):
    """`||x W_gate_down_i R||` with random orthonormal columns `R [r, s]`, scaled so that the square
    has the right mean.
    """
    matrix = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (r, s)))[0] * (r / s) ** 0.5

    def project(w_gate_down, _):
        return w_gate_down @ matrix

    return Approximation(project, scores_of_all, operations=s / r, candidates=candidates)


def principal(r, s, candidates=None, use_data=True):
    """The s directions of each expert's activations that hold most of its squared norm, and the
    mean of the rest.

    These are the first right singular vectors of W_gate_down_i, or with `use_data` of `X
    W_gate_down_i` for tokens X with the given covariance. The rest is estimated as an expert's
    constant times `||x||^2`.
    """
    find = partial(_find_principal, s, use_data)
    return Approximation(
        _project, _estimate_principal, find, operations=s / r, candidates=candidates
    )


def _find_principal(s, use_data, w_gate_down, covariance):
    if not use_data:
        covariance = jnp.eye(w_gate_down.shape[1])
    energy, directions = jnp.linalg.eigh(second_moments(w_gate_down, covariance))  # ascending
    left = jnp.maximum(energy[:, : energy.shape[1] - s], 0).sum(axis=1) / jnp.trace(covariance)
    return directions[:, :, energy.shape[1] - s :], left


def _project(w_gate_down, found):
    directions, left = found
    return w_gate_down @ directions, left


def _estimate_principal(x, prepared):
    w, left = prepared
    kept = scores_of_all(x, w)
    return jnp.sqrt(kept**2 + left * jnp.sum(x * x, axis=1, keepdims=True))


def second_moments(w_gate_down, covariance):
    """Second moments `[n, r, r]` of experts' activations, for tokens of `covariance [d, d]`."""
    return jnp.einsum("ndr,de,neq->nrq", w_gate_down, covariance, w_gate_down)


def effective_rank(second_moments):
    """The number of directions over which energy is spread, `(sum of eigenvalues)^2 / sum of their
    squares`: `[..., r, r] -> [...]`.
    """
    trace = jnp.trace(second_moments, axis1=-2, axis2=-1)
    return trace**2 / jnp.sum(second_moments**2, axis=(-2, -1))


def methods(r):
    """name -> `Approximation`, for experts of rank `r`; the first one is exact."""
    found = {"exact": exact(), "bfloat16": bfloat16(), "int8": int8(), "float8 e4m3": float8()}
    families = {
        "random projection": random_projection,
        "singular vectors": partial(principal, use_data=False),
        "principal directions": principal,
    }
    for family, make in families.items():
        for divisor, counts in ((2, (None,)), (4, (None, 2, 3)), (8, (2, 3))):
            for candidates in counts:
                name = f"{family} r/{divisor}" + (f", {candidates}K exact" if candidates else "")
                found[name] = make(r, max(1, r // divisor), candidates)
    return found

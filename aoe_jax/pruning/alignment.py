"""Experts that compute the same, brought into the same form before they are averaged.

Hidden units can be permuted, and of a factorised gate the low rank can be rotated: `(Wdown Q, Q^T
Wup)` has the same product and the same norms `|x Wdown|` for every orthogonal Q. Experts here are
dictionaries of arrays by name, `w_g [d, f]`, or `w_down [d, r]` and `w_up [r, f]`; `w_p [d, f]`,
`w_o [f, d]`.
"""

import numpy as np
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment

ROUNDS = 2  # of rotation and permutation, each of which depends on the other


def aligned(reference, expert):
    """`expert` in the form that lies nearest to `reference`: the same function, and of a factorised
    gate the same norms.

    The rotation solves the orthogonal Procrustes problem for `Wdown` and `Wup` together, the
    permutation the assignment problem for `Wup` (or `Wg`), `Wp` and `Wo`. Signs and scales that
    `Wp` and `Wo` of a unit could share otherwise stay.
    """
    for _ in range(ROUNDS if "w_down" in expert else 1):
        if "w_down" in expert:
            expert = _rotated(expert, _rotation(reference, expert))
        expert = _permuted(expert, _permutation(reference, expert))
    return expert


def _rotation(reference, expert):
    """`[r, r]` orthogonal."""
    there = np.concatenate([reference["w_down"], reference["w_up"].T])
    here = np.concatenate([expert["w_down"], expert["w_up"].T])
    return orthogonal_procrustes(here, there)[0]


def _rotated(expert, q):
    return expert | {"w_down": expert["w_down"] @ q, "w_up": q.T @ expert["w_up"]}


def _permutation(reference, expert):
    """For each hidden unit of the reference the one of the expert that takes its place, `[f]`."""
    gate = "w_up" if "w_up" in expert else "w_g"
    likeness = reference["w_o"] @ expert["w_o"].T
    for name in (gate, "w_p"):
        likeness += reference[name].T @ expert[name]
    return linear_sum_assignment(likeness, maximize=True)[1]


def _permuted(expert, order):
    by_column = {name: expert[name][:, order] for name in ("w_g", "w_up", "w_p") if name in expert}
    return expert | by_column | {"w_o": expert["w_o"][order]}

"""Experts as arrays by name, and the same experts in another form."""

import numpy as np

SHAPES = {
    "aoe": {"w_down": (16, 6), "w_up": (6, 20), "w_p": (16, 20), "w_o": (20, 16)},
    "router": {"w_g": (16, 20), "w_p": (16, 20), "w_o": (20, 16)},
}


def draw(kind, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape, scale=shape[0] ** -0.5) for name, shape in SHAPES[kind].items()
    }


def disguised(expert, seed):
    """The same function, and the same norms: hidden units in another order, the low rank rotated."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(expert["w_p"].shape[1])
    found = {
        name: a[order] if name == "w_o" else a[:, order]
        for name, a in expert.items()
        if name != "w_down"
    }
    if "w_down" in expert:
        q = np.linalg.qr(rng.normal(size=(expert["w_down"].shape[1],) * 2))[0]
        found |= {"w_down": expert["w_down"] @ q, "w_up": q.T @ found["w_up"]}
    return {name: found[name].astype(a.dtype) for name, a in expert.items()}


def output(expert, x):
    """`(E(x), |x Wdown|)`, the norm of whole gates 0."""
    c = x @ expert["w_down"] if "w_down" in expert else None
    gate = x @ expert["w_g"] if c is None else c @ expert["w_up"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ expert["w_p"])
    return hidden @ expert["w_o"], np.linalg.norm(c, axis=1) if c is not None else np.zeros(len(x))

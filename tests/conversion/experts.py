"""Experts as arrays by name, and the same experts in another form."""

import numpy as np

SHAPES = {
    "aoe": {"w_gate_down": (16, 6), "w_gate_up": (6, 20), "w_up": (16, 20), "w_down": (20, 16)},
    "router": {"w_gate": (16, 20), "w_up": (16, 20), "w_down": (20, 16)},
}


def draw(kind, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape, scale=shape[0] ** -0.5) for name, shape in SHAPES[kind].items()
    }


def disguised(expert, seed):
    """The same function and norms: hidden units in another order, the low rank rotated."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(expert["w_up"].shape[1])
    found = {
        name: a[order] if name == "w_down" else a[:, order]
        for name, a in expert.items()
        if name != "w_gate_down"
    }
    if "w_gate_down" in expert:
        q = np.linalg.qr(rng.normal(size=(expert["w_gate_down"].shape[1],) * 2))[0]
        found |= {"w_gate_down": expert["w_gate_down"] @ q, "w_gate_up": q.T @ found["w_gate_up"]}
    return {name: found[name].astype(a.dtype) for name, a in expert.items()}


def output(expert, x):
    """`(E(x), |x w_gate_down|)`, the norm of whole gates 0."""
    c = x @ expert["w_gate_down"] if "w_gate_down" in expert else None
    gate = x @ expert["w_gate"] if c is None else c @ expert["w_gate_up"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ expert["w_up"])
    return hidden @ expert["w_down"], np.linalg.norm(c, axis=1) if c is not None else np.zeros(
        len(x)
    )

"""Figures of load, for reports: NumPy functions of shares of load `[..., n]`, `LayerStats.load`."""

import numpy as np
from scipy.special import entr


def load_entropy(load):
    """Ent_load (Eq. 7) of the shares of load, `[..., n] -> [...]` of NumPy; log n at most."""
    share = np.asarray(load) / np.maximum(np.sum(load, axis=-1, keepdims=True), 1e-9)
    return entr(share).sum(axis=-1)


def load_spread(load, live=None):
    """Sum over layers of the largest minus the smallest load of live experts: `[L, n] -> []`."""
    least = load if live is None else np.where(live > 0, load, np.inf)
    return (np.max(load, axis=-1) - np.min(least, axis=-1)).sum()


def mean_load(load, live=None):
    """The mean load of live experts, `[..., n] -> [...]`."""
    return load.mean(axis=-1) if live is None else load.sum(axis=-1) / (live > 0).sum(axis=-1)


def dead_experts(load, live=None):
    """Which experts have no token, `[..., n]` bool; a free place is not a dead expert."""
    return load == 0 if live is None else (load == 0) & (live > 0)

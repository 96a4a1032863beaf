"""Load statistics of L layers of n experts; `load` is the fraction of tokens per expert."""

import numpy as np
from scipy.special import entr


def load_entropy(load):
    """Ent_load (Eq. 7), the entropy of the normalised load: `[..., n] -> [...]`, at most log n."""
    share = np.asarray(load) / np.maximum(np.sum(load, axis=-1, keepdims=True), 1e-9)
    return entr(share).sum(axis=-1)


def load_spread(load, live=None):
    """`[L, n] -> []`: the largest minus the smallest load of live experts, summed over layers."""
    least = load if live is None else np.where(live > 0, load, np.inf)
    return (np.max(load, axis=-1) - np.min(least, axis=-1)).sum()


def layer_statistics(load, live=None):
    """Returns `{name: statistic [L]}`, from loads `[L, n]`.

    `load_entropy` is in nats. `load_max_over_mean` is the largest divided by the mean load: 1 in
    perfect balance, and 0 if no token is routed to any expert. `dead_experts` is the number of
    experts without tokens. If a method adds and removes experts, `live [L, n]` is 0 for experts
    that do not exist at this step; no statistic counts them.
    """
    n_live = load.shape[-1] if live is None else (live > 0).sum(axis=-1)
    is_dead = load == 0 if live is None else (load == 0) & (live > 0)
    found = {
        "load_entropy": load_entropy(load),
        "load_max_over_mean": load.max(axis=-1) * n_live / np.maximum(load.sum(axis=-1), 1e-9),
        "dead_experts": is_dead.sum(axis=-1),
    }
    return found if live is None else found | {"live_experts": n_live}

"""DynMoE (Guo et al., arXiv 2405.14297): tokens go to any number of experts, and experts are added
and removed.

    score c[t, i]: the cosine of token and router column;  gap = ReLU(sigmoid(tau c[t, i]) - sigmoid(tau G[i]))
    token t goes to expert i where gap > 0;  weight = 1 / (the number of its experts)

G, an expert's threshold, is a parameter and starts at 0: then half of the experts take a token. The
gate that is 1 where the gap is above 0 sends its gradient to the gap as if it were the gap, so
experts that don't take a token get none. In training a token may have no expert, and the layer adds
nothing to it; elsewhere it goes to the expert of the highest score.

The layer has a pool of n places, of which some hold an expert. In every `period_steps` steps, after
`idle_steps` of them, `record_steps` are recorded: how often each expert fires (R_E), and the sum of
the tokens that no expert takes (R_S). Then the experts that never fired are removed, and where R_S
isn't zero, the first free place gets an expert, at most one a layer: the router's column is R_S /
||R_S||, the threshold 0; the rest is what the place held, which AdamW's weight decay goes on
shrinking while the place is free.

With a router the loss is that of the paper, `||Wg' Wg - I||_F` over the normalised columns of live
experts ("diversity") plus the mean length of all columns ("simplicity"), summed over layers as in
the authors' code. Two terms that their code has and the paper hasn't are off by default:
`balance_weight`, of `n sum_i f_i P_i` over the tokens that have an expert, P_i the mean of gates
that are divided by their sum; and `efficiency_weight`, of the mean of all gates. Left out is a
temperature that is learned. Columns start as others do here, nearly orthogonal where the paper's
are orthogonal.

With AoE, which the paper doesn't know (this project's reading): the score is the relative norm of
`scoring.relative_norms`, around 0 like a cosine. There is no loss of columns, for there are none,
and flattened Wdown have no angles that count: turning an expert's rank space changes them and
nothing else. The Wdown of a new expert is of rank one, from R_S / ||R_S|| to where the Wdown that
the place held sends it, plus a tenth of that as noise, as large as the median of live experts.

Causal: each token decides by itself. Costs n slots a token, in use or not.

T tokens of the batch, t of this device, n places for experts, d model width, r low rank, L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aoe_jax.experts.balance import balance_loss
from aoe_jax.experts.scoring import activation_norms
from aoe_jax.experts.selection.assignment import SELECTION, by_mask
from aoe_jax.experts.selection.base import Choice, Selection

NOISE = 0.1  # of the Wdown of a new expert, by its rank-one part


@jax.custom_jvp
def straight_through_sign(gap):
    """1 where `gap`, which isn't negative, is above 0, else 0; the gradient is that of the gap."""
    return jnp.sign(gap)


straight_through_sign.defjvps(lambda tangent, _, gap: tangent)


def gates(scores, thresholds, temperature):
    """`scores [t, n]`, `thresholds [n]` -> `[t, n]`, 1 for experts that fire, with a gradient, and
    0 for others.
    """
    gap = jax.nn.sigmoid(temperature * scores) - jax.nn.sigmoid(temperature * thresholds)
    return straight_through_sign(jax.nn.relu(gap))


def best_where_none_fires(fires, scores, live):
    """Which experts process which token once trained: those that fire, or the best live one: `[t,
    n]` bool.
    """
    best = jnp.argmax(jnp.where(live, scores, -jnp.inf), axis=1)
    alone = best[:, None] == jnp.arange(scores.shape[1])
    return jnp.where(fires.any(axis=1, keepdims=True), fires, alone)


def diversity(w_router, live):
    """How far the directions of live experts are from orthogonal: `w_router [d, n]`, `live [n]`
    bool -> `[]`.
    """
    lengths = activation_norms(w_router.T)
    columns = w_router / jnp.where(lengths > 0, lengths, 1)
    products = jnp.matmul(columns.T, columns, precision=jax.lax.Precision.HIGHEST)
    off = jnp.where(live[:, None] & live, products - jnp.eye(live.shape[0]), 0)
    return activation_norms(off.reshape(-1))


def simplicity(w_router):
    """The mean length of the columns of all places: `[d, n]` -> `[]`."""
    return activation_norms(w_router.T).mean()


def updated_pool(live, fired, unclaimed):
    """Who is in the pool after an update: those that fired, and one more where tokens were left.

    Where no token was recorded nothing changes.

    Args:
      live: `[L, n]` bool.
      fired: `[L, n]`, R_E, above 0 for experts that fired.
      unclaimed: `[L, d]`, R_S.

    Returns:
      `(live, added)`, `[L, n]` bool.
    """
    wanted = (unclaimed != 0).any(axis=1, keepdims=True)
    recorded = wanted | (fired > 0).any(axis=1, keepdims=True)
    left = live & ((fired > 0) | ~recorded)
    first_free = jnp.argmin(left, axis=1)[:, None] == jnp.arange(live.shape[1])
    added = wanted & ~left & first_free
    return left | added, added


def columns_of_added(w_router, added, unclaimed):
    """The router with the columns of new experts: `[L, d, n]`, `[L, n]` bool, `[L, d]` -> `[L, d,
    n]`.
    """
    return jnp.where(added[:, None, :], _directions(unclaimed)[:, :, None], w_router)


def w_down_of_added(w_down, live, added, unclaimed):
    """The Wdown with those of new experts: `[L, n, d, r]`; `live`, those before, and `added` `[L,
    n]` bool; `[L, d]`.
    """
    direction = _directions(unclaimed)
    answer = _directions(jnp.einsum("ld,lndr->lnr", direction, w_down))
    lengths = _lengths(w_down)
    own = w_down / jnp.where(lengths > 0, lengths, 1)[:, :, None, None]
    new = direction[:, None, :, None] * answer[:, :, None, :] + NOISE * own
    median = jnp.nanmedian(jnp.where(live, lengths, jnp.nan), axis=1)
    of_new = _lengths(new)
    new *= (median[:, None] / jnp.where(of_new > 0, of_new, 1))[:, :, None, None]
    return jnp.where(added[:, :, None, None], new, w_down)


def _directions(vectors):
    lengths = activation_norms(vectors)[..., None]
    return vectors / jnp.where(lengths > 0, lengths, 1)


def _lengths(matrices):
    return activation_norms(matrices.reshape(*matrices.shape[:-2], -1))


class TopAny(Selection):
    """`experts.selection="top_any"`: state `live [n]`, R_E `fired [n]`, R_S `unclaimed [d]`, and
    `updates []`, its steps.
    """

    relative_scores = True
    balances_by = "adding and removing experts"
    shares = ("served",)

    def parameters(self, experts, settings):
        """G."""
        return {"firing_threshold": (nn.initializers.zeros_init(), (experts.n_experts,))}

    def initial_state(self, experts, balance, settings, d):
        """As in `Selection`."""
        n = experts.n_experts
        live = (jnp.arange(n) < (settings.initial_experts or n)).astype(jnp.float32)
        return {
            "live": live,
            "fired": jnp.zeros(n),
            "unclaimed": jnp.zeros(d),
            "updates": jnp.zeros(()),
        }

    def choose(self, experts, scores, given):
        """As in `Selection`."""
        live, real = given.state["live"] > 0, given.token_weights[:, None] > 0
        gate = gates(scores, given.parameters["firing_threshold"], given.settings.temperature)
        gate = jnp.where(live & real, gate, 0)
        chosen, records = jax.lax.stop_gradient(gate) > 0, None
        if given.training:
            nobodys = (real & ~chosen.any(axis=1, keepdims=True))[:, 0]
            x = jax.lax.stop_gradient(given.x).astype(scores.dtype)
            left = jnp.einsum(
                "t,td->d", nobodys.astype(scores.dtype), x, precision=jax.lax.Precision.HIGHEST
            )
            records = {"unclaimed": given.devices.total(left)}
            if given.settings.balance_weight or given.settings.efficiency_weight:
                records |= self._gate_means(given, gate)
        else:
            chosen = best_where_none_fires(chosen, scores, live) & real
        chosen = checkpoint_name(chosen, SELECTION)
        weight = jnp.where(gate > 0, gate, 1) / jnp.maximum(chosen.sum(axis=1, keepdims=True), 1)
        return Choice(by_mask(chosen, weight), records, live=given.state["live"])

    @staticmethod
    def _gate_means(given, gate):
        """Means over tokens: of gates, of gates by their sum over those who have an expert, and who
        has one.
        """
        fired = gate.sum(axis=1, keepdims=True)
        share = gate / jnp.where(fired > 0, fired, 1)
        sums = (
            gate.sum(axis=0),
            share.sum(axis=0),
            (fired > 0).sum().astype(gate.dtype),
            given.token_weights.sum(),
        )
        gates, shares, n_served, n_tokens = given.devices.total(sums)
        n_tokens, n_some = jnp.maximum(n_tokens, 1), jnp.maximum(n_served, 1)
        return {
            "gates": gates / n_tokens,
            "gate_shares": shares / n_some,
            "served": n_served / n_tokens,
        }

    def losses(self, config, stats, per_token, state, token_weights, weights):
        """As in `Selection`."""
        c, records, terms = config.top_any, stats.records, {}
        if "w_router" in weights:
            terms["diversity"] = (
                c.loss_weight,
                jax.vmap(diversity)(weights["w_router"], state["live"] > 0),
            )
            terms["simplicity"] = c.loss_weight, jax.vmap(simplicity)(weights["w_router"])
        if c.balance_weight:
            load = stats.load / jnp.where(records["served"] > 0, records["served"], 1)[:, None]
            terms["gate_balance"] = c.balance_weight, balance_loss(load, records["gate_shares"])
        if c.efficiency_weight:
            terms["efficiency"] = c.efficiency_weight, records["gates"].mean(axis=1)
        return {name: (weight, value.sum()) for name, (weight, value) in terms.items()}

    def next_state(self, config, state, stats):
        """As in `Selection`."""
        fired, unclaimed, is_due = self._records(config, state, stats)
        live, _ = updated_pool(state["live"] > 0, fired, unclaimed)
        return {
            "live": jnp.where(is_due, live.astype(jnp.float32), state["live"]),
            "fired": jnp.where(is_due, 0, fired),
            "unclaimed": jnp.where(is_due, 0, unclaimed),
            "updates": state["updates"] + 1,
        }

    def next_parameters(self, config, weights, state, stats):
        """As in `Selection`.

        The optimiser's moments of a new expert are what they were. Tokens have sent it no gradient
        for `record_steps` steps at least; a router's column still has had that of its length
        (`simplicity`).
        """
        fired, unclaimed, is_due = self._records(config, state, stats)
        live = state["live"] > 0
        names = ("firing_threshold", "w_router" if config.experts.has_router else "w_down")

        def with_added(thresholds, scoring):
            _, added = updated_pool(live, fired, unclaimed)
            if config.experts.has_router:
                scoring = columns_of_added(scoring, added, unclaimed)
            else:
                scoring = w_down_of_added(scoring, live, added, unclaimed)
            return jnp.where(added, 0, thresholds), scoring

        old = [weights[name] for name in names]
        return dict(
            zip(names, jax.lax.cond(is_due, with_added, lambda *same: same, *old), strict=True)
        )

    def _records(self, config, state, stats):
        """`(R_E [L, n], R_S [L, d])` with this step in them, and whether an update is due after it,
        `[]` bool.
        """
        c = config.top_any
        step = state["updates"][0] % c.period_steps - c.idle_steps
        counts = (step >= 0) & (step < c.record_steps)
        fired = state["fired"] + jnp.where(counts, stats.load, 0)
        unclaimed = state["unclaimed"] + jnp.where(counts, stats.records["unclaimed"], 0)
        return fired, unclaimed, counts & (step == c.record_steps - 1)

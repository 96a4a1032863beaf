"""Analyses how a run routes tokens, checkpoint by checkpoint.

Every checkpoint that the run has kept chooses experts for the same tokens, the first ones of the
validation split. `RUN/routing.json` has load, entropies, dead experts, mean norms or logits, and
the overlap of the choices with the final ones. For the final model it also has which experts are
chosen together, and how close its choices are to an oracle's.

The oracle of a layer knows the outputs `E_i(x)` of all n experts. It takes the K experts whose sum,
with the layer's weights for chosen experts, is nearest to the mixture of all n experts by their
probabilities, the softmax of `Hooks.balance_logits`. Its inputs are the model's own.

L layers, T tokens, n experts, K chosen, S sets of K experts, d model width.
"""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aoe_jax.compare.results import LAYER_FIGURES
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError, shown
from aoe_jax.evaluation.models import load_model
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.experts import single_expert
from aoe_jax.storage.files import (
    COUNT,
    NUMBER,
    Kind,
    misfit,
    one_of,
    or_none,
    read_json,
    write_json,
)
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.load_statistics import layer_statistics
from aoe_jax.training.validation import compile_eval_step, validation_batches

ORACLE_TOKENS = 64  # of each batch
MAX_SETS = 1000  # of experts that the oracle tries
_MOST_BYTES = 2**28  # of routing.json: a hundred layers of 256 experts
_ORACLE = ("agreement", "distance_chosen", "distance_oracle", "distance_any")


def _array(*shape):
    def holds(value):
        try:
            found = np.array(value)
        except ValueError:  # rows of different lengths
            return False
        return found.shape == shape and (
            found.dtype.kind in "iuf" or all(map(or_none(NUMBER).holds, found.flat))
        )

    return Kind(f"numbers of shape {list(shape)}", holds)


def _schema(config):
    n_layers, n = config.model.n_layers, config.experts.n_experts
    of_layers, of_experts = _array(n_layers), _array(n_layers, n)
    checkpoint = {"step": COUNT, "load": of_experts, "mean_score": of_experts}
    oracle, k = dict.fromkeys(_ORACLE, of_layers), _experts_per_token(config)
    return {
        "wanted_tokens": or_none(COUNT),  # files of earlier versions have none
        "tokens": COUNT,
        "kind": one_of(config.experts.kind),
        "checkpoints": [checkpoint | dict.fromkeys(LAYER_FIGURES, of_layers)],
        "coactivation": _array(n_layers, n, n),
        "oracle": Kind(
            f"{', '.join(_ORACLE)} with a number for each of {n_layers} layers, or null",
            lambda value: value is None or (k is not None and not misfit(value, oracle)),
        ),
        "experts_per_token": one_of(k),
    }


def _experts_per_token(config):
    """K of a run; None if it depends on the token."""
    choice = config.routing.choice(config.experts)
    return config.experts.top_k if choice and choice.is_fixed else None


class Observation(NamedTuple):
    """The choices of a layer for a batch."""

    chosen: jax.Array  # [T, n] bool
    oracle: jax.Array | None  # [t, 4], see `oracle_figures`; None: not for this layer or mesh


def observing(decoder: Decoder):
    """Returns the same decoder with an `Observation` as the record "observed" of its statistics."""
    choice, k = decoder.routing.choice(decoder.experts), decoder.experts.top_k
    few_sets = choice.is_fixed and math.comb(decoder.experts.n_experts, k) <= MAX_SETS

    def observe(scores, slots, weights, ctx):
        n_tokens, n = scores.shape
        chosen = jnp.zeros((n_tokens, n + 1), bool).at[slots.token, slots.expert].set(True)[:, :n]
        figures = None
        if few_sets and ctx.devices.total_size == 1:
            logits = decoder.routing.hooks.balance_logits(scores)
            x, *some = (a[:ORACLE_TOKENS] for a in (ctx.x, logits, chosen))
            x, weights = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights))
            outputs = single_expert(jnp.broadcast_to(x, (n, *x.shape)), weights)  # [n, t, d]
            is_normalised = decoder.routing.norm_topk_prob
            figures = oracle_figures(outputs.swapaxes(0, 1), *some, k, is_normalised)
        return Observation(ctx.devices.all_tokens(chosen), figures)

    return decoder.clone(observe=observe)


def oracle_figures(outputs, scores, chosen, k, is_normalised):
    """Compares the chosen experts with the oracle's (see the top of the file).

    `outputs [t, n, d]` are `E_i(x)` of every expert, `scores` are `[t, n]`, and `chosen [t, n]`
    bool has `k` experts of each token. With `is_normalised` the weights are the softmax over the
    chosen scores, else over all.

    Returns `[t, 4]` float32: the share of the chosen experts that the oracle takes too, and the
    distances to the mixture of all experts, relative to its length, of the chosen experts, of the
    oracle's, and of any K experts (the mean over all sets).
    """
    n = scores.shape[1]
    sets = np.array([np.isin(range(n), best) for best in itertools.combinations(range(n), k)])
    of_all = jax.nn.softmax(scores)
    target = jnp.einsum("tn,tnd->td", of_all, outputs)
    length = jnp.maximum(jnp.linalg.norm(target, axis=-1), 1e-9)

    def distance(members):  # [..., t or 1, n] -> [..., t]
        of_members = jax.nn.softmax(jnp.where(members, scores, -jnp.inf))
        weights = of_members if is_normalised else of_all * members
        mixture = jnp.einsum("...tn,tnd->...td", weights, outputs)
        return jnp.linalg.norm(mixture - target, axis=-1) / length

    of_sets = distance(sets[:, None, :])  # [S, t]
    best = jnp.asarray(sets)[jnp.argmin(of_sets, axis=0)]
    in_common = (best & chosen).sum(axis=1) / k
    figures = [in_common, distance(chosen), of_sets.min(axis=0), of_sets.mean(axis=0)]
    return jnp.stack(figures, axis=1)


def overlap(chosen, final):
    """Computes the mean share of a token's final experts that another model has chosen too.

    `[L, T, n]` bool, twice -> `[L]`. The mean is over tokens with final experts; 1 without any.
    """
    wanted, in_common = final.sum(axis=-1), (chosen & final).sum(axis=-1)
    shares = in_common / np.maximum(wanted, 1)  # 0 for tokens without experts
    n_tokens = (wanted > 0).sum(axis=-1)
    return np.where(n_tokens > 0, shares.sum(axis=-1) / np.maximum(n_tokens, 1), 1)


def coactivation(chosen):
    """Computes the share of tokens for which two experts are chosen together.

    `[L, T, n]` bool -> `[L, n, n]`; the diagonal is the load.
    """
    chosen = chosen.astype(np.float32)
    return np.einsum("ltn,ltm->lnm", chosen, chosen) / chosen.shape[1]


def analyse(folder: Path, n_tokens: int):
    """Writes `routing.json` of a run, from `n_tokens` of its validation split in whole batches.
    Raises `UserError` if the run cannot be read.
    """
    steps, model = Checkpoints(folder).steps(), load_model(folder, "newest")
    config = model.config
    decoder = observing(model.decoder)
    eval_step = compile_eval_step(decoder, config.data.document_mask, model.mesh)
    size = config.train.batch_size // config.train.accumulate
    n_batches = math.ceil(n_tokens / (size * config.data.seq_len))
    on_host = list(itertools.islice(validation_batches(folder, config, size), n_batches))
    is_real = np.concatenate([batch["weights"].reshape(-1) > 0 for batch in on_host])
    batches = [model.put(batch) for batch in on_host]
    with jax.set_mesh(model.mesh):
        found = {}
        for step in steps:
            of_step = model if step == model.step else load_model(folder, str(step))
            run = partial(eval_step, of_step.params, of_step.routing_state)
            found[step] = _gathered([jax.device_get(run(batch)) for batch in batches], is_real)
    final = found[steps[-1]]
    report = {
        "wanted_tokens": n_tokens,
        "tokens": final["chosen"].shape[1],
        "kind": config.experts.kind,
        "checkpoints": [_figures(step, figures, final) for step, figures in found.items()],
        "coactivation": coactivation(final["chosen"]).tolist(),
        "oracle": final["oracle"],
        "experts_per_token": _experts_per_token(config),
    }
    write_json(folder / "routing.json", report, indent=None)


def read_routing(file: Path, config: Config):
    """Returns the content of a `routing.json`; lists become float64 arrays, with NaN for numbers
    that were not finite. Raises `UserError` if it cannot be read or is of another configuration.
    """
    wanted = "remove it, and run the command again"
    report = read_json(file, wanted, _schema(config), _MOST_BYTES)
    steps = [checkpoint["step"] for checkpoint in report["checkpoints"]]
    if not steps or steps != sorted({*steps}):
        raise UserError(
            f"{file} cannot be read: the steps of its checkpoints, {shown(steps)}, do not rise; "
            f"{wanted}"
        )
    for part in (*report["checkpoints"], report["oracle"] or {}):
        part |= {name: np.array(part[name], np.float64) for name in part.keys() - {"step"}}
    return report | {"coactivation": np.array(report["coactivation"], np.float64)}


def _gathered(results, is_real):
    """Joins the observations of all batches: means over tokens, and the choices of real tokens."""
    of_batches = [stats for _, _, stats in results]
    observations = [stats.records["observed"] for stats in of_batches]
    means = [stats._replace(records=None) for stats in of_batches]
    stats = jax.tree.map(lambda *a: np.mean(a, axis=0), *means)
    chosen = np.concatenate([o.chosen for o in observations], axis=1)[:, is_real]
    oracle = None
    if observations[0].oracle is not None:
        means = np.mean([o.oracle.mean(axis=1) for o in observations], axis=0)  # [L, 4]
        oracle = {name: means[:, i].tolist() for i, name in enumerate(_ORACLE)}
    return {"stats": stats, "chosen": chosen, "oracle": oracle}


def _figures(step, figures, final):
    stats, load = figures["stats"], figures["chosen"].mean(axis=1)  # [L, n]
    of_load = layer_statistics(load, stats.live)
    by_name = {
        "load": load,
        "load_entropy": of_load["load_entropy"],
        "confidence_entropy": stats.confidence_entropy,
        "max_violation": np.maximum(of_load["load_max_over_mean"] - 1, 0),
        "dead_experts": of_load["dead_experts"],
        "mean_score": stats.mean_score,
        "overlap_with_final": overlap(figures["chosen"], final["chosen"]),
    }
    return {"step": step} | {name: np.asarray(value).tolist() for name, value in by_name.items()}

"""How a run routes tokens, checkpoint by checkpoint.

Every checkpoint that the run has kept chooses experts for the same tokens, the first ones of the
validation split. Written to `RUN/routing.json`: load, entropies, dead experts, mean norms or
logits, how much the choices have in common with the final ones, and of the final model which
experts are chosen together, and how near its choice is to an oracle's.

The oracle of a layer knows the outputs `E_i(x)` of all n experts. It takes the K experts whose sum,
weighed as the layer weighs chosen experts, lies nearest to the mixture of all n by the softmax over
all scores. Its inputs are the model's own.

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

from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.evaluation.models import load_model
from aoe_jax.evaluation.perplexity import make_eval_step
from aoe_jax.experts.balance import LayerStats, dead_experts, load_entropy, mean_load
from aoe_jax.experts.selection import SELECTIONS
from aoe_jax.json_files import write_json
from aoe_jax.model.decoder import Decoder, DecoderLayer
from aoe_jax.sharding import replicated
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.workdir import check_data

ORACLE_TOKENS = 64  # of each batch
MAX_SETS = 1000  # of experts that the oracle tries


class Observation(NamedTuple):
    """What a layer says of a batch beside its statistics."""

    stats: LayerStats
    chosen: jax.Array  # [T, n] bool
    oracle: jax.Array | None  # [t, 4], see `oracle_figures`; None: not of this layer or mesh


def observed(decoder: Decoder):
    """The same decoder, whose statistics are `Observation`s; it takes the same parameters."""

    class Layer(DecoderLayer):
        def make_experts(self, kind, **settings):
            return super().make_experts(_observing(kind), **settings)

    class Observed(Decoder):
        pass

    Observed.Layer = Layer
    return Observed(
        decoder.model, decoder.experts, decoder.balance, decoder.transport, decoder.settings
    )


def _observing(kind):
    class Observing(kind):
        def pipeline(self, devices, x, given, scores, balance_scores, gate, weights):
            """As in the layer."""
            c, n = self.config, scores.shape[1]
            assignment = self.method.choose(c, scores, given).assignment
            chosen = (
                jnp.zeros((x.shape[0], n + 1), bool)
                .at[assignment.token, assignment.expert]
                .set(True)[:, :n]
            )
            figures = None
            if (
                self.method.all_slots_used
                and math.comb(n, c.top_k) <= MAX_SETS
                and devices.total_size == 1
            ):
                some = slice(ORACLE_TOKENS)
                figures = oracle_figures(
                    expert_outputs(x[some], weights), scores[some], chosen[some], c.top_k, c.gate
                )
            y, stats, _ = super().pipeline(devices, x, given, scores, balance_scores, gate, weights)
            return y, Observation(stats, devices.all_tokens(chosen), figures), None

    return Observing


def expert_outputs(x, w):
    """`E_i(x)` of every expert, `[t, n, d]` float32: `x [t, d]`, `w` the weights of a layer by
    name.
    """
    x = x.astype(jnp.float32)
    if "w_g" in w:
        gate = jnp.einsum("td,ndf->tnf", x, w["w_g"])
    else:
        gate = jnp.einsum("td,ndr,nrf->tnf", x, w["w_down"], w["w_up"], optimize="optimal")
    return jnp.einsum(
        "tnf,nfd->tnd", jax.nn.silu(gate) * jnp.einsum("td,ndf->tnf", x, w["w_p"]), w["w_o"]
    )


def oracle_figures(outputs, scores, chosen, k, gate):
    """How near the chosen experts come to the oracle's (see the top of the file).

    Args:
      outputs: `[t, n, d]` float32 of every expert.
      scores: `[t, n]`.
      chosen: `[t, n]` bool, k of them.
      k: K.
      gate: `ExpertsConfig.gate`.

    Returns:
      `[t, 4]` float32: the share of the chosen that the oracle takes too, and the distance to the
      mixture of all, as a share of its length, of the chosen, of the oracle's and of any K experts
      (the mean over all sets).
    """
    n = scores.shape[1]
    sets = np.zeros((math.comb(n, k), n), bool)
    for row, members in zip(sets, itertools.combinations(range(n), k), strict=True):
        row[list(members)] = True
    of_all = jax.nn.softmax(scores)
    target = jnp.einsum("tn,tnd->td", of_all, outputs)

    def weights_of(members):
        return (
            of_all * members
            if gate == "all"
            else jax.nn.softmax(jnp.where(members, scores, -jnp.inf))
        )

    def distance(members):  # [..., t or 1, n] -> [..., t]
        mixture = jnp.einsum("...tn,tnd->...td", weights_of(members), outputs)
        return jnp.linalg.norm(mixture - target, axis=-1) / jnp.maximum(
            jnp.linalg.norm(target, axis=-1), 1e-9
        )

    of_sets = distance(sets[:, None, :])  # [S, t]
    best = jnp.asarray(sets)[jnp.argmin(of_sets, axis=0)]
    in_common = (best & chosen).sum(axis=1) / k
    return jnp.stack(
        [in_common, distance(chosen), of_sets.min(axis=0), of_sets.mean(axis=0)], axis=1
    )


def max_violation(load, mean):
    """The largest load over the mean, less 1; 0 in a layer in which no token has an expert: `[L,
    n]`, `[L]` -> `[L]`.
    """
    return np.where(mean > 0, load.max(axis=1) / np.maximum(mean, 1e-9) - 1, 0)


def overlap(chosen, final):
    """The mean share of a token's final experts that another model has chosen too: `[L, T, n]` bool
    twice -> `[L]`.

    Over tokens that have some in the end; 1 where none has.
    """
    wanted = final.sum(axis=-1)
    share = np.where(wanted > 0, (chosen & final).sum(axis=-1) / np.maximum(wanted, 1), 0).sum(
        axis=-1
    )
    with_some = (wanted > 0).sum(axis=-1)
    return np.where(with_some > 0, share / np.maximum(with_some, 1), 1)


def coactivation(chosen):
    """How often two experts are chosen for one token, as a share of the tokens: `[L, T, n]` bool ->
    `[L, n, n]`.
    """
    chosen = chosen.astype(np.float32)
    return np.einsum("ltn,ltm->lnm", chosen, chosen) / chosen.shape[1]


def analyse(folder: Path, n_tokens: int):
    """Writes `routing.json` of a run; returns what it holds.

    Args:
      folder: the run's directory.
      n_tokens: tokens of the validation split to route, rounded up to whole batches.

    Raises:
      UserError: there is no run, or it can't be read.
    """
    steps = Checkpoints(folder).steps()
    model = load_model(folder, "newest")
    config, kind = model.config, model.config.experts.kind
    decoder = observed(model.decoder)
    eval_step = jax.jit(
        make_eval_step(decoder, config.data.document_mask), out_shardings=replicated(model.mesh)
    )
    size = config.train.batch_size // config.train.accumulate
    some = itertools.islice(
        validation_batches(folder, config, size), -(-n_tokens // (size * config.data.seq_len))
    )
    some = list(some)
    real = np.concatenate([batch["weights"].reshape(-1) > 0 for batch in some])
    batches = [model.put(batch) for batch in some]
    with jax.set_mesh(model.mesh):
        found = {}
        for step in steps:
            of_step = model if step == model.step else load_model(folder, str(step))
            run = partial(eval_step, of_step.params, of_step.routing_state)
            found[step] = _gathered([jax.device_get(run(batch)) for batch in batches], real)
    final = found[steps[-1]]
    report = {
        "wanted_tokens": n_tokens,
        "tokens": final["chosen"].shape[1],
        "kind": kind,
        "checkpoints": [_figures(step, figures, final) for step, figures in found.items()],
        "coactivation": coactivation(final["chosen"]).tolist(),
        "oracle": final["oracle"],
        # Of every token; None where it depends on the token.
        "experts_per_token": config.experts.top_k
        if SELECTIONS[config.experts.selection].all_slots_used
        else None,
    }
    write_json(folder / "routing.json", report, indent=None)
    return report


def validation_batches(folder, config, size):
    """The whole batches, of `size` sequences, of the validation split of a run, on the host;
    without any, what there is.

    Raises:
      UserError: the split isn't the one that the run had.
    """
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(folder, corpus)
    stores, n_whole = corpus.validation.values(), 0
    for store in stores:
        for batch in eval_batches(store, config.data.seq_len, size):
            if batch["weights"].all():  # the last batch of a split has padding
                n_whole += 1
                yield batch
    if not n_whole:
        yield next(eval_batches(next(iter(stores)), config.data.seq_len, size))


def _gathered(results, real):
    """The observations of all batches: means over tokens, and the choices of `real [T]` ones, one
    after another.
    """
    observations = [observation for _, _, observation in results]
    stats = jax.tree.map(lambda *a: np.mean(a, axis=0), *(o.stats for o in observations))
    oracle = None
    if observations[0].oracle is not None:
        means = np.mean([o.oracle.mean(axis=1) for o in observations], axis=0)  # [L, 4]
        names = ("agreement", "distance_chosen", "distance_oracle", "distance_any")
        oracle = {name: means[:, i].tolist() for i, name in enumerate(names)}
    return {
        "stats": stats,
        "chosen": np.concatenate([o.chosen for o in observations], axis=1)[:, real],
        "oracle": oracle,
    }


def _figures(step, figures, final):
    """Of one checkpoint; a list a layer."""
    stats, load = figures["stats"], figures["chosen"].mean(axis=1)  # [L, n]
    return {
        "step": step,
        "load": load.tolist(),
        "load_entropy": load_entropy(load).tolist(),
        "confidence_entropy": stats.confidence_entropy.tolist(),
        "max_violation": max_violation(load, mean_load(load, stats.live)).tolist(),
        "dead_experts": dead_experts(load, stats.live).sum(axis=1).tolist(),
        "mean_score": stats.mean_score.tolist(),
        "overlap_with_final": overlap(figures["chosen"], final["chosen"]).tolist(),
    }

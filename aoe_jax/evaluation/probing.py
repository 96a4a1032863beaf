"""Evaluates a router MoE that chooses experts by norms of their activations (`aoe_jax.probe`).

Every expert computes one intermediate result, such as `x w_gate`. The norms of these results
replace the router's logits, and the top K experts process the token (the paper's Tables 1, 6, 7).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tabulate import tabulate
from tqdm import tqdm

from aoe_jax.config.checks import require
from aoe_jax.config.run import Config
from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import TextTokens, read_text
from aoe_jax.evaluation.models import Model, corpus_of, first_batches, load_model, source_config
from aoe_jax.moe.routing import FixedK, best_experts, by_token
from aoe_jax.parameters import EXPERTS
from aoe_jax.storage.files import make_folder, write_report
from aoe_jax.storage.paths import parsed_path
from aoe_jax.training.step_times import seconds_in_turn
from aoe_jax.training.validation import evaluate_batches

# Intermediate results (nodes) of an expert's formula; the paper's Wg and Wp are w_gate and w_up.
NODES = ("x Wg", "x Wp", "SiLU(x Wg)", "SiLU(x Wg) * x Wp", "output")
NORMS = {"L1": 1, "L2": 2, "Linf": jnp.inf}

# `choose` is a function `(router logits [T, n], weights, ctx) -> scores [T, n]`.


def by_router(logits, weights, ctx):
    """Returns the router's logits, so that the experts are those of the unchanged model."""
    return logits


def by_chance(logits, weights, ctx):
    """Returns random scores, different for each layer and token, and the same on every mesh."""
    # The seed is computed from router weights, which differ between layers only.
    total = weights["w_router"].astype(jnp.float32).sum()
    key = jax.random.fold_in(jax.random.key(0), jax.lax.bitcast_convert_type(total, jnp.int32))
    shape = (logits.shape[0] * ctx.devices.total_size, logits.shape[1])
    return ctx.devices.own_tokens(jax.random.uniform(key, shape))


def by_norm(node, norm):
    """Returns a `choose` whose scores are norms of a result; see `NORMS` and `NODES`."""

    def choose(logits, weights, ctx):
        devices = ctx.devices
        x = devices.gather(ctx.x, "expert")

        def score(w):  # the matrices of one expert -> [T]
            gate, up = x @ w["w_gate"], x @ w["w_up"]
            hidden = jax.nn.silu(gate) * up
            at_nodes = gate, up, jax.nn.silu(gate), hidden, hidden @ w["w_down"]
            activations = dict(zip(NODES, at_nodes, strict=True))[node].astype(jnp.float32)
            return jnp.linalg.norm(activations, NORMS[norm], axis=-1)

        whole = {
            name: devices.gather_weight(EXPERTS[name], weights[name], x.dtype)
            for name in ("w_gate", "w_up", "w_down")
        }
        # Experts run one after another, because together they need too much memory.
        scores = jax.lax.map(score, whole)
        return devices.exchange(scores.T, split=0, concatenate=1)

    return choose


@dataclass(frozen=True)
class ProbeRouter(FixedK):
    """Routes each token to the K experts with the highest scores of `choose`.

    The record `agreement []` is the mean share of a token's experts that the router chooses too.
    """

    name = "probe"

    choose: Callable = by_router
    equal_weights: bool = False  # True: expert weights 1 / K; False: softmax of the chosen scores

    def __call__(self, scores, weights, ctx):
        k, n_experts = ctx.top_k, scores.shape[1]
        other_scores = self.choose(scores, weights, ctx)
        expert = best_experts(other_scores, k)
        if self.equal_weights:
            weight = jnp.full(expert.shape, 1 / k, scores.dtype)
        else:
            weight = jax.nn.softmax(jnp.take_along_axis(other_scores, expert, axis=1))
        is_chosen, is_routed = (
            jax.nn.one_hot(e, n_experts).sum(axis=1) for e in (expert, best_experts(scores, k))
        )
        share = (is_chosen * is_routed).sum(axis=1) / k
        sums = jnp.sum(share * ctx.token_weights), ctx.token_weights.sum()
        agreement, n_tokens = ctx.devices.total(sums)
        return by_token(expert, weight)._replace(records={"agreement": agreement / n_tokens})


# (node, norm) of a row of the table -> function that scores the experts.
PROBES = {("router", ""): by_router, ("random", ""): by_chance}
PROBES |= {(node, norm): by_norm(node, norm) for node in NODES for norm in NORMS}
# The weights of the chosen experts are the softmax of their scores (for the router: the weights of
# the unchanged model), or they are equal.
WEIGHTS = ("softmax", "equal")


def check_config(config: Config):
    """Raises `UserError` if the router of a model cannot be replaced."""
    wanted = "a probe drops a router; use a plain router MoE with routing.name='top_k'"
    require(config.routing.name == "top_k", "routing.name", config.routing.name, wanted)
    plain = {"kind": "router", "factorised_gate": False, "large_router": False}
    for name, value in plain.items():
        found = getattr(config.experts, name)
        require(found == value, f"experts.{name}", found, wanted)


def check_probes(model: Model):
    """Raises `UserError` if a bias chooses the experts too, or `mesh.tensor` is not 1."""
    config = model.config
    if "selection_bias" in model.routing_state:
        wanted = "experts are chosen by a selection bias too; probe a model without one"
        raise UserError(f"config.balance.bias_rate: {wanted}")
    wanted = "splits experts, but a norm needs the whole width of an expert; set 1"
    require(config.mesh.tensor == 1, "mesh.tensor", config.mesh.tensor, wanted)


def probe_checkpoint(
    checkpoint: Path,
    output: Path,
    step="newest",
    mesh=None,
    text=None,
    corpora=None,
    split="validation",
    n_tokens=100_000,
    tasks=(),
    limit=None,
    **settings,
):
    """Runs all `PROBES` on a model, prints a table, writes `probe.json`, and returns its content.

    The arguments are the flags of `aoe_jax.probe`; `settings` are passed to `tasks.load_tasks`. The
    content is `step`, `tokens` and the list `probes`. Each probe has `node`, `norm`, `agreement`
    (the share of the chosen experts that the router chooses too), `seconds_per_token`, `time`
    (relative to the router's time), and the dicts `nll` and `tasks`, with keys of `WEIGHTS`.
    """
    check_config(source_config(checkpoint))
    if output != checkpoint:
        make_folder(output, "output")
    score_tasks = None
    if tasks:  # loaded before the model, so that a wrong name fails early
        from aoe_jax.evaluation import tasks as of_lm_eval  # needs lm-eval

        loaded = of_lm_eval.load_tasks(tasks, **settings)
        score_tasks = partial(of_lm_eval.score_model, tasks=loaded, limit=limit)
    model = load_model(checkpoint, step, mesh)
    check_probes(model)
    entries, passes = [], {}
    with jax.set_mesh(model.mesh):
        if text is None:
            stores = getattr(corpus_of(model, checkpoint, corpora), split).values()
        else:
            stores = [TextTokens([read_text(parsed_path(text, "--text"))], model.tokenizer)]
        batches = first_batches(model, stores, n_tokens)
        for (node, norm), choose in tqdm(PROBES.items(), unit="probe"):
            entry, passes[node, norm] = _run(model, choose, batches, score_tasks)
            entries.append({"node": node, "norm": norm, **entry})
        seconds = seconds_in_turn(passes, rounds=2)
    for entry, own in zip(entries, seconds.values(), strict=True):
        entry["seconds_per_token"] = own / batches[0]["weights"].size
        entry["time"] = own / seconds["router", ""]
    tokens = int(sum(batch["weights"].sum() for batch in batches))
    report = {"step": model.step, "tokens": tokens, "probes": entries}
    if jax.process_index() == 0:
        print(probe_table(report))
        write_report(output / "probe.json", report, "output")
    return report


def _run(model, choose, batches, score_tasks):
    """Returns the report's entry for a probe, and a function that runs it on the first batch."""
    entry, timed = {"nll": {}, "tasks": {}}, None
    for weights in WEIGHTS if choose is not by_chance else ("equal",):
        probed, is_unchanged = model, choose is by_router and weights == "softmax"
        if not is_unchanged:
            decoder = model.decoder.clone(routing=ProbeRouter(choose, weights == "equal"))
            probed = dataclasses.replace(model, decoder=decoder)
        step = probed.eval_step(model.config.data.document_mask)
        result = evaluate_batches(step, batches, model.put)
        entry["nll"][weights] = result.nll
        if timed is None:
            records = result.stats.records
            entry["agreement"] = 1.0 if is_unchanged else float(records["agreement"].mean())
            timed = partial(step, model.put(batches[0]))
        if score_tasks:
            entry["tasks"][weights] = score_tasks(probed)
    return entry, timed


def probe_table(report):
    """Formats the report of `probe_checkpoint`, one row for each probe and kind of weights."""
    rows = []
    for entry in report["probes"]:
        name = f"{entry['norm']} {entry['node']}".strip()
        for weights, nll in entry["nll"].items():
            row = {"experts chosen by": name, "weights": weights, "nll": f"{nll:.4f}"}
            row |= {"agreement": f"{entry['agreement']:.3f}", "time": f"{entry['time']:.2f}"}
            for task, found in entry["tasks"].get(weights, {}).items():
                metric, figure = next(iter(found["metrics"].items()))
                row[f"{task} {metric}"] = f"{figure['value']:.4f}"
            rows.append(row)
    return tabulate(rows, "keys", "plain", disable_numparse=True)

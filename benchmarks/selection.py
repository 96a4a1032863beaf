"""Cheaper ways to choose for AoE, which scores all n experts for every token: whether they find the
same K experts.

`python -m benchmarks.selection --workdir=DIR [--steps=200] [--tokens=16384] [--repeats=7]
[--json=FILE]` trains the 8-of-64 model of `benchmarks.step` on the embedded corpus, loss-free (a
finished run is not repeated, a stopped one continues), takes the inputs of its layers of experts on
validation text, and compares the choices of every method of `benchmarks.approximate_scores` with
those of exact float32 scoring. Each method has a line with:

- agreement: the share of the exact choice that it finds, mean over tokens and layers, and layer by
  layer; identical: the share of tokens for which it finds the whole choice; nll: the change of the
  model's nll on the same tokens when every layer chooses that way. The model is trained with the
  exact choice; activations and weights of the chosen experts are exact;
- its scoring FLOPs relative to exact ones, where 8-bit FLOPs count half, and the measured time of
  scoring and choosing in one layer. `prepare` quantises or projects the weights, so training needs
  it once a step. `find` finds the directions to project on: once for a trained model; in training
  they may be older than the weights, but become worse as the weights change;
- the ratio of an AoE step to a router step. In FLOPs: as executed (the chosen activations are
  computed again), and for the forward pass alone in brackets. In time: both steps are measured, and
  the time that the method saves in scoring is subtracted, with directions found never and at every
  step. Their covariance of the tokens costs `d / (n r)` of scoring if it is of all tokens, which is
  not counted.

The last line is the bound for every method: scoring and choosing at no cost.

Axis letters: see `aoe_jax/moe/__init__.py`.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from aoe_jax import cli
from aoe_jax.data.pipeline import eval_batches
from aoe_jax.evaluation.models import corpus_of, load_model
from aoe_jax.model.counts import forward_flops_per_token, training_flops_per_token
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.layer import ExpertsLayer
from aoe_jax.moe.routing import Choice, Method, best_experts
from aoe_jax.moe.routing import top_k as choose_top_k
from aoe_jax.training.loop import train
from aoe_jax.training.step import sequence_nll
from aoe_jax.training.step_times import RepeatedStep
from aoe_jax.training.workdir import check_workdir
from benchmarks.approximate_scores import (
    Approximation,
    agreement,
    choice_scores,
    effective_rank,
    methods,
    relative_cost,
    second_moments,
)
from benchmarks.step import MODELS
from benchmarks.timing import configuration, machine_in_words, medians, report, run_benchmark

SPARSE = MODELS["sparse"]  # d_low = d / 3
AOE = {"experts": {"d_low": 64}, "balance": {"aux_weight": 0.0, "bias_rate": 0.01}}
COVARIANCE_BATCHES = 4  # batches of train text

_WORKDIR = flags.DEFINE_string("workdir", None, "a directory for the run")
_STEPS = flags.DEFINE_integer("steps", 200, "training steps", lower_bound=51)
_TOKENS = flags.DEFINE_integer(
    "tokens", 16384, "validation tokens, rounded up to whole batches", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 7, "timed calls of each function", lower_bound=1)


def trained_model(config, workdir):
    """Trains unless that is done; returns the `Model` and its corpus."""
    check_workdir(workdir, config)
    if not (workdir / "summary.json").exists():
        train(config, workdir)
    model = load_model(workdir)
    return model, corpus_of(model, workdir)


def first_batches(store, config, count):
    """The first batches of a split."""
    return list(
        itertools.islice(eval_batches(store, config.data.seq_len, config.train.batch_size), count)
    )


def layer_inputs(config, params, routing_state, batches):
    """The inputs of the layers of experts in each batch, without padding: a list of `[L, T, d]`."""

    def instead_of_statistics(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, ExpertsLayer) and context.method_name == "__call__":
            return result[0], args[0].reshape(-1, args[0].shape[-1])
        return result

    decoder = Decoder.from_config(config)
    with nn.intercept_methods(instead_of_statistics):
        # The decoder stacks over layers whatever stands in the place of statistics.
        take = jax.jit(lambda batch: sequence_nll(decoder, params, routing_state, batch, False)[1])
        return [take(batch)[:, batch["weights"].reshape(-1) > 0] for batch in batches]


@dataclass(frozen=True)
class ByApproximation(Method):
    """Top-k by `choice_scores`. Only the choice is approximate: with sparse scoring, weights come
    from the exact norms of the chosen experts. The state has `prepared` and `selection_bias`.
    """

    name = "top_k"
    approximation: Approximation

    def choice(self, experts):
        return Choice(experts.top_k, is_fixed=True, is_normalised=True)

    def __call__(self, scores, weights, ctx):
        """A `Routing` by `choice_scores`, not by `scores`."""
        prepared, bias = ctx.state["prepared"], ctx.state["selection_bias"]
        scores = choice_scores(
            self.approximation, ctx.x, weights["w_gate_down"], prepared, ctx.top_k, bias
        )
        return choose_top_k(scores, ctx.top_k, bias=bias)


def nll_with(method, config, params, bias, prepared, batches):
    """Mean nll of the batches where each layer chooses by `choice_scores`."""
    decoder = Decoder.from_config(config).clone(routing=ByApproximation(method))
    state = {"selection_bias": bias, "prepared": prepared}
    step = jax.jit(lambda batch: sequence_nll(decoder, params, state, batch, False)[0])
    total = sum(float(step(batch)) for batch in batches)
    return total / sum(float(batch["weights"].sum()) for batch in batches)


def executed_flops(config, scoring_cost, useful_flops):
    """FLOPs per token, of a training step or a forward pass, where scoring takes `scoring_cost`
    times exact scoring. The scoring of all experts is added to the useful FLOPs, which have that of
    the chosen experts.
    """
    c = config.experts
    one_expert = 2 * config.model.d_model * c.d_low
    extra = (scoring_cost * c.n_experts - (c.n_experts - c.top_k)) * one_expert
    return useful_flops(config) + config.model.n_layers * extra


def chosen_experts(method, top_k, x, w_gate_down, prepared, bias):
    """The choice of one layer, `[T, K]`."""
    scores = choice_scores(method, x, w_gate_down, prepared, top_k, bias)
    return best_experts(scores, top_k, bias)


def compare(choose, exact, inputs, w_gate_down, prepared, bias):
    """Mean agreement with the exact choice and share of identical sets, `[L]` each. `choose` is a
    compiled `chosen_experts`, `exact` a list over layers of lists over batches, `inputs` a list of
    `[L, T, d]`, `w_gate_down` `[L, n, d, r]`, `prepared` the results of the method's `prepare`,
    stacked over layers, and `bias` `[L, n]`.
    """
    by_layer = []
    for layer, wanted in enumerate(exact):
        of_layer = jax.tree.map(lambda a: a[layer], (w_gate_down, prepared, bias))
        pairs = [
            agreement(e, choose(x[layer], *of_layer)) for e, x in zip(wanted, inputs, strict=True)
        ]
        by_layer.append(
            [float(np.mean(np.concatenate(values))) for values in zip(*pairs, strict=True)]
        )
    return [list(values) for values in zip(*by_layer, strict=True)]


def main():
    root = cli.path_of(_WORKDIR).absolute()
    root.mkdir(parents=True, exist_ok=True)
    config = configuration("aoe", SPARSE, AOE, {"train": {"steps": _STEPS.value}})
    router = configuration("moe", SPARSE, {"balance": {"aux_tokens": 1.0}})
    n_layers = config.model.n_layers
    n_experts, top_k = config.experts.n_experts, config.experts.top_k
    model, corpus = trained_model(config, root / f"steps{_STEPS.value}")
    params, routing_state = model.params, model.routing_state
    bias = routing_state["selection_bias"]
    print(machine_in_words(), flush=True)

    tokens_per_batch = config.tokens_per_step
    batches = first_batches(
        corpus.validation["sotu"], config, -(-_TOKENS.value // tokens_per_batch)
    )
    inputs = layer_inputs(config, params, routing_state, batches)
    train_batches = first_batches(corpus.train["sotu"], config, COVARIANCE_BATCHES)
    train_inputs = layer_inputs(config, params, routing_state, train_batches)
    squares = sum(jnp.einsum("ltd,lte->lde", x, x) for x in train_inputs)
    covariance = squares / sum(x.shape[1] for x in train_inputs)
    w_gate_down = params["layers"]["experts"]["w_gate_down"]
    ranks = effective_rank(jax.vmap(second_moments)(w_gate_down, covariance)).mean(axis=1).tolist()

    found = methods(config.experts.d_low)
    choose = {
        name: jax.jit(partial(chosen_experts, method, top_k)) for name, method in found.items()
    }
    directions = {
        name: jax.vmap(method.find)(w_gate_down, covariance) for name, method in found.items()
    }
    prepared = {
        name: jax.vmap(method.prepare)(w_gate_down, directions[name])
        for name, method in found.items()
    }
    exact = [
        [
            choose["exact"](x[layer], w_gate_down[layer], prepared["exact"][layer], bias[layer])
            for x in inputs
        ]
        for layer in range(n_layers)
    ]

    # One layer alone, on real tokens: the exact norms of candidates take longer with uneven load.
    middle, timed = n_layers // 2, {"choose": {}, "prepare": {}, "find": {}}
    for name, method in found.items():
        one = jax.tree.map(
            lambda a: a[middle], (directions[name], w_gate_down, prepared[name], bias)
        )
        timed["choose"][name] = partial(choose[name], inputs[0][middle], *one[1:])
        timed["prepare"][name] = partial(jax.jit(method.prepare), one[1], one[0])
        timed["find"][name] = partial(jax.jit(method.find), one[1], covariance[middle])
    seconds = {what: medians(functions, _REPEATS.value) for what, functions in timed.items()}
    step = medians(
        {kind: RepeatedStep(c) for kind, c in {"aoe": config, "router": router}.items()},
        _REPEATS.value,
    )

    def flops_ratios(cost):
        counted = {
            "step_flops_ratio": training_flops_per_token,
            "forward_flops_ratio": forward_flops_per_token,
        }
        return {
            name: executed_flops(config, cost, useful) / useful(router)
            for name, useful in counted.items()
        }

    def step_ratio(layer_seconds):
        change = n_layers * (layer_seconds - seconds["choose"]["exact"])
        return (step["aoe"] + change) / step["router"]

    by_layer = " ".join(f"{rank:.1f}" for rank in ranks)
    print(
        f"effective rank of an expert's activations, layer by layer: {by_layer} of "
        f"{config.experts.d_low}; steps: AoE {1e3 * step['aoe']:.0f} ms, "
        f"router {1e3 * step['router']:.0f} ms",
        flush=True,
    )
    figures, exact_nll = [], None
    for name, method in found.items():
        overlaps, identical = compare(
            choose[name], exact, inputs, w_gate_down, prepared[name], bias
        )
        nll = nll_with(method, config, params, bias, prepared[name], batches)
        exact_nll = nll if exact_nll is None else exact_nll
        cost = relative_cost(method, n_experts, top_k)
        choosing, preparing, finding = (seconds[what][name] for what in timed)
        figure = {
            "method": name,
            "agreement": float(np.mean(overlaps)),
            "layer_agreement": overlaps,
            "identical": float(np.mean(identical)),
            "layer_identical": identical,
            "nll": nll,
            "nll_difference": nll - exact_nll,
            "scoring_flops": cost,
            "choose_ms": 1e3 * choosing,
            "choose_ratio": choosing / seconds["choose"]["exact"],
            "prepare_ms": 1e3 * preparing,
            "find_ms": 1e3 * finding,
            **flops_ratios(cost),
            "step_ratio": step_ratio(choosing + preparing),
            "step_ratio_finding": step_ratio(choosing + preparing + finding),
        }
        figures.append(figure)
        by_layer = " ".join(f"{100 * overlap:.1f}" for overlap in overlaps)
        print(
            f"{name:>35}: agreement {figure['agreement']:7.2%} ({by_layer}), "
            f"identical {figure['identical']:6.1%}, nll {figure['nll_difference']:+.4f}; "
            f"scoring FLOPs {cost:.3f}x, {1e3 * choosing:.1f} ms ({figure['choose_ratio']:.2f}x), "
            f"prepare {1e3 * preparing:.1f} ms, find {1e3 * finding:.1f} ms; "
            f"step / router: FLOPs {figure['step_flops_ratio']:.3f} "
            f"(forward {figure['forward_flops_ratio']:.3f}), "
            f"time {figure['step_ratio']:.3f} to {figure['step_ratio_finding']:.3f}",
            flush=True,
        )
    bound = {**flops_ratios(0.0), "step_ratio": step_ratio(0.0)}
    print(
        f"{'scoring for nothing':>35}: step / router: FLOPs {bound['step_flops_ratio']:.3f} "
        f"(forward {bound['forward_flops_ratio']:.3f}), time {bound['step_ratio']:.3f}; "
        f"exact nll {exact_nll:.4f}"
    )
    step_ms = {kind: 1e3 * value for kind, value in step.items()}
    figures.append(
        {"method": "scoring for nothing", **bound, "step_ms": step_ms, "effective_rank": ranks}
    )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main, timed=True)

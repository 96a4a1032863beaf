"""Prunes a trained model to fewer experts, see `aoe_jax.prune`."""

import dataclasses
import itertools
import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from aoe_jax.config.mesh import MeshConfig
from aoe_jax.config.run import Config
from aoe_jax.data.pipeline import eval_batches, train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.evaluation.perplexity import compile_eval_step, evaluate_batches
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.reading import RUN_FILE, is_model, read_config
from aoe_jax.formats.tokenizer_files import copy_tokenizer, write_tokenizer
from aoe_jax.formats.writing import new_directory, write_arrays, write_run
from aoe_jax.json_files import write_json
from aoe_jax.model.decoder import Decoder
from aoe_jax.moe.balance import load_entropy
from aoe_jax.pruning.merging import METHODS
from aoe_jax.pruning.moments import MergedScores, score_moments
from aoe_jax.pruning.params import pruned_params
from aoe_jax.training.workdir import check_data, read_run_config

log = logging.getLogger(__name__)

PRUNABLE = ("top_k", "top_p", "sparsemixer", "erc", "capacity")  # routers whose scores alone decide

REPORT = "prune.json"


def prune(
    workdir: Path,
    output: Path,
    n_experts: int,
    method="uncurl",
    data=None,
    n_tokens=100_000,
    seed=0,
    step="newest",
    mesh=None,
    baselines=True,
):
    """Writes a model with fewer experts to `output`, which appears only once it is complete.

    It prints a table.

    Args:
      workdir: of a training run, or the directory of a model, see `models.load_model`.
      output: a directory that doesn't exist.
      n_experts: how many every layer is to have.
      method: a name of `merging.METHODS`.
      data: corpora as in `data.name`: the scores on the train split decide which experts are
        similar, the validation split scores the result; None: those of the model's run.
      n_tokens: of the train split, drawn at random, and of each source's validation split, the
        first ones; rounded up to whole batches.
      seed: of the tokens, of k-means and of a new router.
      step: which checkpoint of a run.
      mesh: see `models.load_model`.
      baselines: whether to score the other methods too.

    Returns:
      The content of `prune.json` in `output`: `method`, `step`, the number of `tokens` that scores
      are from, validation `nll` `before` and after each method, and `layers`, for each its `load`
      on these tokens, its `load_entropy` and `load_entropy_after` in validation, and its
      `clusters` with `reference`, `members` and `weights`.

    Raises:
      UserError: the model, the data or the number of experts isn't supported, or `output` exists
        or can't be written.
    """
    with new_directory(output) as partial_output:
        model = load_model(workdir, step, mesh)
        check_prunes(model, n_experts, workdir)
        source = _source_config(workdir)
        train, validation = _batches(model, _open_corpus(workdir, source, data), n_tokens, seed)
        moments, merged_scores = score_moments(model, train), MergedScores(model, train)
        _check_finite(moments, workdir)
        before = _evaluator(model, model.decoder, validation)(model.params, model.routing_state)
        nll = {"before": before.nll}
        decoder = Decoder.from_config(_pruned(model.config, n_experts))
        evaluate_pruned = _evaluator(model, decoder, validation)
        for name in [other for other in METHODS if other != method and baselines] + [method]:
            params, clusters = pruned_params(model, moments, merged_scores, n_experts, name, seed)
            after = evaluate_pruned(params, {})
            nll[name] = after.nll
        report = {
            "method": method,
            "step": model.step,
            "tokens": int(moments.tokens),
            "nll": nll,
            "layers": _layers(moments, clusters, before.stats.load, after.stats.load),
        }
        # The mesh of the run may not divide D.
        config = dataclasses.replace(_pruned(source, n_experts), mesh=MeshConfig())
        _write(workdir, partial_output, model.step, config, params)
        write_json(partial_output / REPORT, report)
    print(prune_table(report))
    _warn(model, method)
    return report


def check_prunes(model: Model, n_experts, workdir):
    """Checks that a model can be pruned to this number of experts.

    Raises:
      UserError: it is dense, its kind or selection isn't supported, it has a large router, or
        `n_experts` is out of range.
    """
    e, has = model.config.experts, f"--workdir={workdir} has"
    router = model.config.routing.name
    if e.kind == "dense":
        raise UserError(f"{has} experts.kind='dense': a dense model has no experts to merge")
    if router == "expert_choice":
        raise UserError(
            f"{has} routing.name='expert_choice': every expert takes equally many tokens, so "
            "nothing says which matter"
        )
    if router not in PRUNABLE:
        raise UserError(
            f"{has} routing.name={router!r}: pruning is not implemented for it; use a model with "
            f"one of {', '.join(PRUNABLE)}"
        )
    if e.large_router:
        raise UserError(
            f"{has} experts.large_router=True: the width of a large router depends on its experts; "
            "use a model without one"
        )
    if not e.top_k <= n_experts < e.n_experts:
        raise UserError(
            f"--experts={n_experts}: must be at least experts.top_k={e.top_k} and fewer than the "
            f"{e.n_experts} experts of {workdir}"
        )


def _source_config(workdir) -> Config:
    """The configuration as it was given, not as fitted to the devices here."""
    if is_model(workdir):
        return read_config(workdir)
    return read_run_config(workdir / "config.json")


def _pruned(config, n_experts):
    """The configuration with fewer experts, and without a selection bias."""
    experts = dataclasses.replace(config.experts, n_experts=n_experts)
    balance = dataclasses.replace(config.balance, bias_rate=0.0)
    return dataclasses.replace(config, experts=experts, balance=balance)


def _batches(model, corpus, n_tokens, seed):
    """Lists of host batches: random ones of the train split, the first of each validation split."""
    size, seq_len = model.config.train.batch_size, model.config.data.seq_len
    n = -(-n_tokens // (size * seq_len))
    train = train_batches(corpus.train, corpus.weights, seq_len, size, seed)
    validation = [eval_batches(store, seq_len, size) for store in corpus.validation.values()]
    firsts = (itertools.islice(batches, n) for batches in validation)
    return list(itertools.islice(train, n)), list(itertools.chain.from_iterable(firsts))


def _open_corpus(workdir, config, data):
    if data is None:
        corpus = open_corpus(config.data, config.model.vocab_size)
        check_data(workdir, corpus)
        return corpus
    tokenizer = str(saved_tokenizer(workdir))
    try:
        named = dataclasses.replace(config.data, name=data, path=None, tokenizer=tokenizer)
        return open_corpus(named, config.model.vocab_size)
    except UserError as e:
        raise UserError(f"--data={data}: {e}") from e


def _check_finite(moments, workdir):
    for layer, scatter in enumerate(moments.scatter):
        if not np.isfinite(scatter).all():
            what = f"scores of layer {layer} aren't finite; the model is damaged"
            raise UserError(f"--workdir={workdir}: {what}")


def _evaluator(model, decoder, batches):
    """A function `(params, routing state) -> Evaluation`, compiled once."""
    step = compile_eval_step(decoder, model.config.data.document_mask, model.mesh)

    def evaluate(params, routing_state):
        score = partial(step, params, routing_state)
        with jax.set_mesh(model.mesh):
            return evaluate_batches(score, tqdm(batches, "validation", unit="batch"), model.put)

    return evaluate


def _layers(moments, clusters, load, load_after):
    return [
        {
            "load": moments.load[layer].tolist(),
            "load_entropy": float(load_entropy(load[layer])),
            "load_entropy_after": float(load_entropy(load_after[layer])),
            "clusters": [dataclasses.asdict(cluster) for cluster in of_layer],
        }
        for layer, of_layer in enumerate(clusters)
    ]


def _write(workdir, directory, step, config, params):
    values = to_json(config)
    if is_model(workdir):
        values |= copy_tokenizer(workdir, directory)
    else:
        values |= write_tokenizer(workdir, directory, config.model.max_len)
    write_arrays(directory, values, params, {}, None)
    if not is_model(workdir) or (workdir / RUN_FILE).exists():
        write_run(directory, workdir, step, config)


def _warn(model, method):
    if "selection_bias" in model.routing_state:
        log.warning(
            "the selection bias of loss-free balancing was made for the old experts: it starts at "
            "0 again, and balance.bias_rate=0 in the result, so give a rate when you train it"
        )
    if model.config.experts.has_router and method != "greedy":
        log.warning(
            "the router is a new random one, so nll tells nothing before it is trained, see "
            "train.router_steps"
        )


def prune_table(report):
    """The report of `prune` as lines of text, a row a layer; experts are numbered from 0."""
    head = "experts merged into one, and their share of the load"
    rows = [f"{'layer':>5}  {'Ent_load':>8}  {'after':>6}  {head}"]
    for number, layer in enumerate(report["layers"]):
        share = np.array(layer["load"]) / sum(layer["load"])
        clusters = [cluster["members"] for cluster in layer["clusters"]]
        shown = "  ".join(
            f"{'+'.join(map(str, members))} {100 * share[members].sum():.1f}%"
            for members in map(list, clusters)
        )
        entropies = f"{layer['load_entropy']:>8.3f}  {layer['load_entropy_after']:>6.3f}"
        rows.append(f"{number:>5}  {entropies}  {shown}")
    n, n_after = len(report["layers"][0]["load"]), len(report["layers"][0]["clusters"])
    nll = ", ".join(f"{name} {value:.4f}" for name, value in report["nll"].items())
    most = f"Ent_load is at most {np.log(n):.3f}, then {np.log(n_after):.3f}"
    return "\n".join([*rows, f"{most}; validation nll: {nll}"])

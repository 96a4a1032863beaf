"""A trained model with fewer experts: `prune(workdir, output, n_experts)` writes one, see
`aoe_jax.prune`.

L layers, Z experts, D merged ones.
"""

import dataclasses
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from aoe_jax.config import BY_SCORES_ALONE, Config, MeshConfig
from aoe_jax.data.pipeline import eval_batches, train_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.data.tokenizer import saved_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.evaluation.perplexity import make_eval_step
from aoe_jax.experts.balance import load_entropy
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.reading import RUN_FILE, is_model, read_config
from aoe_jax.formats.tokenizer_files import copy_tokenizer, write_tokenizer
from aoe_jax.formats.writing import new_directory, write_arrays
from aoe_jax.json_files import read_json, write_json
from aoe_jax.model.decoder import Decoder
from aoe_jax.pruning.clustering import METHODS
from aoe_jax.pruning.moments import MergedScores, score_moments
from aoe_jax.pruning.params import pruned_params
from aoe_jax.sharding import replicated
from aoe_jax.training.workdir import check_data, read_config_json

log = logging.getLogger(__name__)

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
    """Writes a model with fewer experts to `output`, which comes into being only when it is
    complete; prints a table.

    Args:
      workdir: what `models.load_model` reads.
      output: a directory that doesn't exist.
      n_experts: D, of every layer.
      method: one of `clustering.METHODS`.
      data: corpora as in `data.name`, whose train split says what is alike and whose validation
        split scores the result; None: those of the model's run.
      n_tokens: of the train split, drawn at random, and of each source's validation split, the
        first ones; in whole batches.
      seed: of the tokens, of k-means and of a new router.
      step: which checkpoint of a run.
      mesh: as in `models.load_model`.
      baselines: whether to score the other methods too.

    Returns:
      What `prune.json` in `output` holds: `method`, `step`, `tokens` gone by, validation `nll`
      `before` and after a method, and `layers`, for each the `load` `[Z]` of these tokens,
      `load_entropy` and `load_entropy_after` in validation, and `clusters`: `reference`, `members`
      and their `weights`.

    Raises:
      UserError: the model, the data or the number of experts can't be, or `output` exists or can't
        be written.
    """
    with new_directory(output) as partial_output:
        model = load_model(workdir, step, mesh)
        check_prunes(model, n_experts, workdir)
        source = _config_of(workdir)
        config = _with_experts(model.config, n_experts)
        train, validation = _batches(model, _corpus(workdir, source, data), n_tokens, seed)
        moments, merged_scores = score_moments(model, train), MergedScores(model, train)
        _check_finite(moments, workdir)
        score, score_pruned = (
            _scorer(model, model.decoder),
            _scorer(model, Decoder.from_config(config)),
        )
        nll = {}
        nll["before"], load = score(model.params, model.routing_state, validation)
        for name in [other for other in METHODS if other != method and baselines] + [method]:
            params, clusters = pruned_params(model, moments, merged_scores, n_experts, name, seed)
            nll[name], load_after = score_pruned(params, {}, validation)
        report = {"method": method, "step": model.step, "tokens": int(moments.tokens), "nll": nll}
        report["layers"] = _layers(moments, clusters, load, load_after)
        # The mesh of the run may not divide D.
        source = dataclasses.replace(_with_experts(source, n_experts), mesh=MeshConfig())
        _write(workdir, partial_output, model, source, params)
        write_json(partial_output / REPORT, report)
    print(prune_table(report))
    _say_what_is_new(model, method)
    return report


def check_prunes(model: Model, n_experts, workdir):
    """Checks that a model has more experts than it is to have, and that something says which of
    them matter.

    Raises:
      UserError: it is dense, chooses by expert choice, has a large router, or `n_experts` can't be.
    """
    e, of = model.config.experts, f"--workdir={workdir} has"
    if e.kind == "dense":
        raise UserError(f"{of} experts.kind='dense': a dense model has no experts to merge")
    if e.selection == "expert_choice":
        raise UserError(
            f"{of} experts.selection='expert_choice': every expert takes equally many tokens, so nothing says which matter"
        )
    if e.kind not in ("aoe", "router", "capacity") or e.selection not in BY_SCORES_ALONE:
        raise UserError(
            f"{of} experts.kind={e.kind!r} and selection={e.selection!r}: pruning isn't implemented for them; use a model "
            f"of kind aoe, router or capacity, and selection {' or '.join(BY_SCORES_ALONE)}"
        )
    if e.large_router:
        raise UserError(
            f"{of} experts.large_router=True: the width of a large router goes by its experts; prune another"
        )
    if not e.top_k <= n_experts < e.n_experts:
        wanted = f"must be at least experts.top_k={e.top_k} and fewer than the {e.n_experts} experts of {workdir}"
        raise UserError(f"--experts={n_experts}: {wanted}")


def _config_of(workdir) -> Config:
    """As it was given, not as it lies on the devices here."""
    if is_model(workdir):
        return read_config(workdir)
    return Config.from_config_dict(read_config_json(workdir / "config.json"))


def _with_experts(config, n_experts):
    """With other experts, for which a selection bias is still to be made: the model has none."""
    experts, balance = (
        dataclasses.replace(config.experts, n_experts=n_experts),
        dataclasses.replace(config.balance, bias_rate=0.0),
    )
    return dataclasses.replace(config, experts=experts, balance=balance)


@dataclasses.dataclass(frozen=True)
class _Some:
    """The first of some batches, the same at every pass."""

    batches: Callable[[], Iterable[dict]]
    n: int

    def __len__(self):
        return self.n

    def __iter__(self):
        return itertools.islice(self.batches(), self.n)


def _batches(model, corpus, n_tokens, seed):
    """Host batches of the train split, in a random order, and of the validation split."""
    size, seq_len = model.config.train.batch_size, model.config.data.seq_len
    n = -(-n_tokens // (size * seq_len))
    train = _Some(lambda: train_batches(corpus.train, corpus.weights, seq_len, size, seed), n)
    of_sources = [
        _Some(
            partial(eval_batches, store, seq_len, size),
            min(n, -(-(len(store) - 1) // (size * seq_len))),
        )
        for store in corpus.validation.values()
    ]
    return train, _Some(lambda: itertools.chain(*of_sources), sum(map(len, of_sources)))


def _corpus(workdir, config, data):
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
            raise UserError(
                f"--workdir={workdir}: scores of layer {layer} aren't finite; the model is damaged"
            )


def _scorer(model, decoder):
    """`(params, routing state, host batches) -> (nll, load [L, n])`, means over tokens."""
    eval_step = make_eval_step(decoder, model.config.data.document_mask)
    eval_step = jax.jit(eval_step, out_shardings=replicated(model.mesh))

    def score(params, routing_state, batches):
        nll_sum, tokens, load = 0.0, 0.0, 0.0
        with jax.set_mesh(model.mesh):
            for batch in tqdm(batches, desc="validation", unit="batch"):
                nll, count, stats = jax.device_get(
                    eval_step(params, routing_state, model.put(batch))
                )
                nll_sum, tokens = nll_sum + float(nll), tokens + float(count)
                load = load + np.asarray(stats.load, np.float64) * count
        return nll_sum / tokens, load / tokens

    return score


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


def _write(workdir, directory, model, config, params):
    own = is_model(workdir)
    values = to_json(config)
    if own:
        known = read_json(workdir / "config.json")
        values |= {
            name: known.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        copy_tokenizer(workdir, directory)
    else:
        values |= write_tokenizer(workdir, directory, config.model.max_len)
    write_arrays(directory, values, params, {}, None)
    if not own or (workdir / RUN_FILE).exists():
        write_json(directory / RUN_FILE, {"step": model.step, "config": config.to_dict()})
    if (workdir / "data.json").exists():
        shutil.copyfile(workdir / "data.json", directory / "data.json")


def _say_what_is_new(model, method):
    if "selection_bias" in model.routing_state:
        log.warning(
            "the selection bias of loss-free balancing was made for the old experts: it starts at 0 again, and "
            "balance.bias_rate=0 in the result, so give a rate when you train it"
        )
    if model.config.experts.has_router and method != "greedy":
        log.warning(
            "the router is drawn anew, so nll tells nothing before it is trained, see train.router_steps"
        )


def prune_table(report):
    """The report of `prune` as lines of text, a row a layer; experts are numbered from 0."""
    rows = [
        f"{'layer':>5}  {'Ent_load':>8}  {'after':>6}  experts merged into one, and their share of the load"
    ]
    for number, layer in enumerate(report["layers"]):
        share = np.array(layer["load"]) / sum(layer["load"])
        clusters = "  ".join(
            f"{'+'.join(map(str, cluster['members']))} {100 * share[list(cluster['members'])].sum():.1f}%"
            for cluster in layer["clusters"]
        )
        rows.append(
            f"{number:>5}  {layer['load_entropy']:>8.3f}  {layer['load_entropy_after']:>6.3f}  {clusters}"
        )
    n, n_after = len(report["layers"][0]["load"]), len(report["layers"][0]["clusters"])
    nll = ", ".join(f"{name} {value:.4f}" for name, value in report["nll"].items())
    return "\n".join(
        [
            *rows,
            f"Ent_load is at most {np.log(n):.3f}, then {np.log(n_after):.3f}; validation nll: {nll}",
        ]
    )

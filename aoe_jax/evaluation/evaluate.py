"""Evaluates a trained model on a held-out split, or on any text."""

import logging
import math
from pathlib import Path

import jax
import numpy as np

from aoe_jax.data import DOCUMENT_BYTES
from aoe_jax.data.tokenizer import pieces
from aoe_jax.errors import DivergedError, UserError, naming
from aoe_jax.evaluation.loads import draw_loads, load_statistics, load_table
from aoe_jax.evaluation.models import corpus_of, load_model
from aoe_jax.model.counts import log_run
from aoe_jax.storage import files
from aoe_jax.storage.files import write_report
from aoe_jax.storage.paths import parsed_path
from aoe_jax.storage.retry import Tolerated
from aoe_jax.training.validation import evaluate

log = logging.getLogger(__name__)


def evaluate_workdir(workdir: Path, split="test", step="newest", mesh=None, data=None):
    """Evaluates a checkpoint on a split; prints a table, writes `eval.json` and `load.png`.

    The arguments are the flags of `eval.py`. Returns the content of `eval.json`: `split`, `data`
    (None: the run's corpora), `step`, `tokens`, `nll`, `perplexity`, `bits_per_byte`,
    `load_statistics` (None for a dense model) and `sources` (results of each corpus, if several).
    Raises `UserError` if a file cannot be read, `DivergedError` if weights or nll are not finite.
    """
    model = load_model(workdir, step, mesh)
    log_run(model.config)
    stores = getattr(corpus_of(model, workdir, data), split)
    masked = model.config.data.document_mask
    about, file = {"split": split, "data": data}, workdir / "eval.json"
    return _report(model, stores, masked, split, about, file, "load.png")


def evaluate_text(workdir: Path, text, step="newest", mesh=None, limit=None, **settings):
    """Evaluates a checkpoint on a text file or on the prompts of a task. No text attends to another
    text, and end-of-text tokens are scored too. The arguments are the flags of `eval.py`.

    Writes `text.json` and, for models with experts, `text.png`. Returns what `evaluate_workdir`
    returns, but `text` and `texts` (the number of texts) replace `split` and `data`.
    """
    if text.startswith("task:"):
        from aoe_jax.evaluation.tasks import load_tasks, prompts

        with naming(f"--text={text}"):
            texts = prompts(load_tasks([text.removeprefix("task:")], **settings), limit)
    else:
        texts = [read_text(parsed_path(text, "--text"))]
    model = load_model(workdir, step, mesh)
    stores, about = {text: TextTokens(texts, model.tokenizer)}, {"text": text, "texts": len(texts)}
    return _report(model, stores, True, text, about, workdir / "text.json", "text.png")


def _report(model, stores, document_mask, name, about, file, picture):
    config = model.config
    score = model.eval_step(document_mask)
    shape, is_first = (config.data.seq_len, model.batch_size), jax.process_index() == 0
    with jax.set_mesh(model.mesh):
        result = evaluate(score, stores, *shape, model.put, progress=is_first)
    if not math.isfinite(result.nll):
        raise DivergedError(f"the nll of {name} is {result.nll}: the model has diverged")
    statistics = None if config.experts.kind == "dense" else load_statistics(result.stats)
    sources = {source: _scores(own) for source, own in result.sources.items()}
    report = about | {"step": model.step, **_scores(result)}
    report |= {"load_statistics": statistics, "sources": sources}
    if is_first:
        n_texts = f"{about['texts']} texts, " if "texts" in about else ""
        print(f"{name}: {n_texts}{result.tokens} tokens, step {model.step}\n{result.in_words()}")
        for source, own in result.sources.items():
            print(f"{source}: {own.tokens} tokens | {own.in_words()}")
        if statistics:
            print(load_table(statistics))
        write_report(file, report, "workdir")
        if statistics:
            title = f"{config.experts.kind}, {name}, step {model.step}"
            with Tolerated(picture):
                from aoe_jax.training.picture import write_png  # slow to import

                write_png(file.with_name(picture), draw_loads({title: statistics}))
                log.info("wrote %s", file.with_name(picture))
    return report


def _scores(result):
    names = ("tokens", "nll", "perplexity", "bits_per_byte")
    return {name: getattr(result, name) for name in names}


class TextTokens:
    """Holds the tokens `EOT text1 EOT ... EOT` in memory, and has the methods of a token store."""

    def __init__(self, texts, tokenizer):
        """Tokenises the texts."""
        self.end_of_text = tokenizer.end_of_text
        self.text_bytes = sum(len(text.encode()) for text in texts)
        end = np.array([self.end_of_text], np.int32)
        tokens = [end]
        for text in texts:
            for piece in pieces(text):
                tokens += tokenizer.encode([piece])
            tokens.append(end)
        self._tokens = np.concatenate(tokens).astype(np.int32)

    def __len__(self):
        return len(self._tokens)

    def read(self, start, stop):
        """Returns the tokens `[start, stop)`, int32."""
        return self._tokens[start:stop]


def read_text(path: Path):
    """Reads a text file. Raises `UserError` if it cannot be read, is not UTF-8, or is empty."""
    text = files.read_text(path, f"--text={path}:", DOCUMENT_BYTES)
    if not text.strip():
        raise UserError(f"--text={path}: is empty; name a file with text")
    return text

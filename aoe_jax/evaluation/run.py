"""Evaluates a trained model on a held-out split, or on any text."""

import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aoe_jax.config.checks import require_flag
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.load import draw_load_heatmap, load_statistics, load_table
from aoe_jax.evaluation.models import Model, load_model
from aoe_jax.evaluation.perplexity import Evaluation, compile_eval_step, evaluate
from aoe_jax.json_files import write_json
from aoe_jax.training.loop import log_run
from aoe_jax.training.workdir import check_data

log = logging.getLogger(__name__)

SPLITS = ("validation", "test")


def check_split(split):
    """Raises `UserError` unless `split` is one of `SPLITS`."""
    require_flag(split in SPLITS, "split", split, f"choose one of {', '.join(SPLITS)}")


def evaluate_workdir(workdir: Path, split="test", step="newest", mesh=None):
    """Scores a checkpoint on a held-out split.

    It prints a table, and writes `eval.json` and, for models with experts, `load.png`.

    Args:
      workdir: of a training run, or the directory of an exported model.
      split: "validation" or "test".
      step: which checkpoint: "newest", "best" or a number of steps.
      mesh: see `models.load_model`.

    Returns:
      The content of `eval.json`: `split`, `step`, `tokens`, `nll`, `perplexity`, `bits_per_byte`
      and `load_statistics` (None for a dense model) over all sources, and `sources`: for each of
      several its tokens, nll, perplexity and bits per byte.

    Raises:
      UserError: the split is unknown, or there is no such run or checkpoint, or it can't be read.
    """
    check_split(split)
    model = load_model(workdir, step, mesh)
    config = model.config
    log_run(config)
    corpus = open_corpus(config.data, config.model.vocab_size)
    check_data(workdir, corpus)
    result = _evaluate(model, getattr(corpus, split), config.data.document_mask)
    report = {"split": split, "step": model.step, **_figures(result)}
    report["load_statistics"] = _statistics(result, config)
    report["sources"] = {name: _figures(source) for name, source in result.sources.items()}
    if jax.process_index() == 0:
        print(f"{split}: {result.tokens} tokens, step {model.step}\n{_in_words(result)}")
        for name, source in result.sources.items():
            print(f"{name}: {source.tokens} tokens   {_in_words(source)}")
        _write(report, f"{config.experts.kind}, {split}", workdir / "eval.json", "load.png")
    return report


def evaluate_text(workdir: Path, text, step="newest", mesh=None, limit=None, **settings):
    """Shows a checkpoint's load statistics on a text file, or on the prompts of a task.

    Args:
      workdir, step, mesh: see `models.load_model`.
      text: the path of a file, or `task:NAME`.
      limit: how many examples of the task, the first ones; None: all.
      **settings: of `tasks.load_tasks`.

    Returns:
      What `load_on_texts` returns.

    Raises:
      UserError: the file can't be read; or what `tasks.load_tasks` and `models.load_model` raise.
    """
    if text.startswith("task:"):
        from aoe_jax.evaluation.tasks import load_tasks, prompts

        texts = prompts(load_tasks([text.removeprefix("task:")], **settings), limit)
    else:
        texts = [read_text(Path(text).expanduser())]
    return load_on_texts(load_model(workdir, step, mesh), texts, text, workdir)


def load_on_texts(model: Model, texts, name, workdir: Path):
    """Load statistics on texts: attention doesn't cross from one text to another.

    It prints a table, and writes `text.json` and, for models with experts, `text.png`.

    Args:
      model: the model.
      texts: one at least; they are cut into windows of the run's length.
      name: the name of the texts in the report.
      workdir: where to write.

    Returns:
      The content of `text.json`: `text` (the name), `step`, `texts`, `tokens`, `nll`, `perplexity`,
      `bits_per_byte`, `load_statistics`. The ends of texts count as tokens.
    """
    result = _evaluate(model, {name: TextTokens(texts, model.tokenizer)}, document_mask=True)
    report = {"text": name, "step": model.step, "texts": len(texts), **_figures(result)}
    report["load_statistics"] = _statistics(result, model.config)
    if jax.process_index() == 0:
        head = f"{name}: {len(texts)} texts, {result.tokens} tokens, step {model.step}"
        print(f"{head}\n{_in_words(result)}")
        title = f"{model.config.experts.kind}, {name}"
        _write(report, title, workdir / "text.json", "text.png")
    return report


class TextTokens:
    """Texts as a split of a token store, in memory: `EOT text1 EOT text2 ... EOT`."""

    def __init__(self, texts, tokenizer):
        """Tokenises the texts."""
        self.end_of_text = tokenizer.end_of_text
        self.text_bytes = sum(len(text.encode()) for text in texts)
        end = np.array([self.end_of_text], np.int32)
        pieces = [end]
        for tokens in tokenizer.encode(texts):
            pieces += [tokens.astype(np.int32), end]
        self._tokens = np.concatenate(pieces)

    def __len__(self):
        return len(self._tokens)

    def read(self, start, stop):
        """Tokens `[start, stop)`, int32."""
        return self._tokens[start:stop]


def read_text(path: Path):
    """The text of a file.

    Raises:
      UserError: it can't be read, isn't UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise UserError(f"--text={path}: can't be read ({e.strerror}); name a text file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--text={path}: isn't UTF-8 at byte {e.start}; convert it") from e
    if not text.strip():
        raise UserError(f"--text={path}: is empty; name a file with text")
    return text


def _evaluate(model: Model, stores, document_mask) -> Evaluation:
    config = model.config
    step = compile_eval_step(model.decoder, document_mask, model.mesh)
    with jax.set_mesh(model.mesh):
        return evaluate(
            partial(step, model.params, model.routing_state),
            stores,
            config.data.seq_len,
            config.train.batch_size // config.train.accumulate,
            model.put,
        )


def _figures(result):
    names = ("tokens", "nll", "perplexity", "bits_per_byte")
    return {name: getattr(result, name) for name in names}


def _statistics(result, config):
    kind = config.experts.kind
    return None if kind == "dense" else load_statistics(result.stats)


def _in_words(result):
    return (
        f"nll {result.nll:.4f}   perplexity {result.perplexity:.2f}   "
        f"bits per byte {result.bits_per_byte:.4f}"
    )


def _write(report, title, file, picture):
    """Writes a report, and prints and draws its load statistics if it has any."""
    write_json(file, report)
    log.info("wrote %s", file)
    if statistics := report["load_statistics"]:
        print(load_table(statistics))
        figure = draw_load_heatmap(statistics, f"{title}, step {report['step']}")
        figure.savefig(file.with_name(picture), dpi=150)
        log.info("wrote %s", file.with_name(picture))

"""The load of a model's experts on any text: `show_load_on(workdir, text)` prints it, writes
`text.json` and `text.png`.

Each text is seen by itself, in windows of the run's length: attention doesn't reach from one into
another.
"""

import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np

from aoe_jax.errors import UserError
from aoe_jax.evaluation.perplexity import evaluate, make_eval_step
from aoe_jax.evaluation.run import figures_in_words, report_figures, show_load
from aoe_jax.json_files import write_json
from aoe_jax.sharding import replicated

log = logging.getLogger(__name__)


class TextTokens:
    """Texts as a split of a token store, in memory: `EOT text1 EOT text2 ... EOT`."""

    def __init__(self, texts, tokenizer):
        """Tokenises the texts."""
        self.end_of_text, self.text_bytes = (
            tokenizer.end_of_text,
            sum(len(text.encode()) for text in texts),
        )
        end = np.array([tokenizer.end_of_text], np.int32)
        pieces = [
            piece for tokens in tokenizer.encode(texts) for piece in (tokens.astype(np.int32), end)
        ]
        self._tokens = np.concatenate([end, *pieces])

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


def show_load_on(
    workdir: Path,
    text,
    fewshot=None,
    data: Path | None = None,
    limit=None,
    split="test",
    step="newest",
    mesh=None,
):
    """Shows a checkpoint's load statistics on a text file, or on the prompts of a task.

    Args:
      workdir: what `models.load_model` reads.
      text: the path of a file, or `task:NAME`; with a task, the others are as in
        `tasks.evaluate_tasks`.
      mesh: as in `models.load_model`.

    Returns:
      What `load_on_texts` returns.

    Raises:
      UserError: the file can't be read; or as `tasks.load_tasks` and `models.load_model`.
    """
    from aoe_jax.evaluation.models import load_model

    if text.startswith("task:"):
        from aoe_jax.evaluation.tasks import load_tasks, prompts

        texts = prompts(load_tasks([text.removeprefix("task:")], fewshot, data, split), limit)
    else:
        texts = [read_text(Path(text).expanduser())]
    return load_on_texts(load_model(workdir, step, mesh), texts, text, workdir)


def load_on_texts(model, texts, name, workdir: Path):
    """Load statistics of texts; prints their table, writes `text.json` and, for models with
    experts, `text.png`.

    Args:
      model: a `models.Model`.
      texts: one at least.
      name: what the report calls them.
      workdir: where to write.

    Returns:
      What `text.json` holds: `text` (the name), `step`, `texts`, `tokens`, `nll`, `perplexity`,
      `bits_per_byte`, `load_statistics`. The ends of texts are tokens too.
    """
    config = model.config
    eval_step = jax.jit(
        make_eval_step(model.decoder, document_mask=True), out_shardings=replicated(model.mesh)
    )
    with jax.set_mesh(model.mesh):
        result = evaluate(
            partial(eval_step, model.params, model.routing_state),
            {name: TextTokens(texts, model.tokenizer)},
            config.data.seq_len,
            config.train.batch_size // config.train.accumulate,
            model.put,
        )
    report = {
        "text": name,
        "step": model.step,
        "texts": len(texts),
        **report_figures(result, config),
    }
    if jax.process_index() > 0:
        return report
    print(
        f"{name}: {len(texts)} texts, {result.tokens} tokens, step {model.step}\n{figures_in_words(result)}"
    )
    write_json(workdir / "text.json", report)
    show_load(
        report["load_statistics"],
        f"{config.experts.kind}, {name}, step {model.step}",
        workdir / "text.png",
    )
    return report

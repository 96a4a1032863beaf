"""The `README.md` of an exported, converted or pruned model, as the Hugging Face hub shows it."""

from pathlib import Path

from tabulate import tabulate

from aoe_jax.config.run import Config
from aoe_jax.formats.architectures import OWN
from aoe_jax.formats.configs import computed_fields
from aoe_jax.model.counts import parameter_counts
from aoe_jax.storage.files import COUNT, TEXT, or_none, read_json

_FIGURES = ("nll", "perplexity", "bits_per_byte")
_REPORTS = {
    "summary.json": {"metrics": {"step": COUNT}},
    "eval.json": {"split": TEXT, "data": or_none(TEXT), "step": or_none(COUNT)},
}
_LOADED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR{trust})
tokenizer = AutoTokenizer.from_pretrained(DIR{trust})
```
"""
_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [mixture-of-experts]
---
# {name}

A decoder-only language model of `aoe_jax` (experts.kind={kind!r}). It has {counts}.

## Configuration

{fields}

{origin}

## Use

In the commands and the code, DIR is this directory. {classes}
{loaded}
With `aoe_jax` (the last command in the root of its repository):

    python -m aoe_jax.generate --workdir=DIR --prompt='...'
    python -m aoe_jax.eval --workdir=DIR --tasks=piqa
    python train.py --config=configs/finetune.py:DIR --workdir=runs/new
"""


_TRAINING = """\
## Training

{tokens:,} tokens in {step:,} steps, sequences of {seq_len} tokens, from: {sources}.

{figures}"""


def training(config: Config, workdir: Path, step: int) -> str:
    """The section of a card about a run, with the figures in its `workdir` of this step."""
    return _TRAINING.format(
        step=step,
        tokens=step * config.tokens_per_step,
        seq_len=config.data.seq_len,
        sources=", ".join(source.label for source in config.data.sources),
        figures=_figures(workdir, step),
    )


def made_of(source: Path, step: int | None, command: str, result: str, report: str) -> str:
    """The section of a card about a command that made the model of the one in `source`, whose
    checkpoint is that of `step`; None: unknown. `report` is the name of the file of its figures.
    """
    of_step = "" if step is None else f" (step {step:,})"
    made = f"`{command}` made this model of `{source.absolute().name}`{of_step}"
    return f"## Origin\n\n{made}: {result}. `{report}` has all figures."


def write_card(directory: Path, name: str, values: dict, config: Config, origin: str):
    """Writes the card of a model with the title `name`. `values` is the content of `config.json`,
    and `origin` a section of `training` or `made_of`.
    """
    fields = {"model.max_len": config.model.max_len} | computed_fields(config)
    library, loaded = "transformers", _LOADED.format(trust="")
    classes = f"`transformers` loads it as `{values['architectures'][0]}`:\n"
    if "auto_map" in values:
        loaded = _LOADED.format(trust=", trust_remote_code=True")
        classes = "`transformers` loads it with `modeling_aoe.py`:\n"
    elif values["model_type"] == OWN:
        library, loaded = "aoe_jax", ""
        classes = "`transformers` has no class for this model."
    table = tabulate(fields.items(), ("field", "value"), "github", missingval="None")
    about = {"name": name, "kind": config.experts.kind, "counts": parameter_counts(config)}
    about |= {"library": library, "fields": table, "origin": origin}
    card = _CARD.format(**about, classes=classes, loaded=loaded)
    (directory / "README.md").write_text(card)


def _figures(workdir, step):
    """A table of the figures of `summary.json` and `eval.json` that are of this step and of the
    run's corpora.
    """
    found = {}
    for file, schema in _REPORTS.items():
        report = {}
        if (workdir / file).exists():
            report = read_json(workdir / file, "remove it to do without", schema)
        metrics, split = report.get("metrics", report), report.get("split", "validation")
        prefix = "validation_" if "metrics" in report else ""
        if metrics.get("step") == step and report.get("data") is None:
            found[split] = [metrics.get(prefix + name) for name in _FIGURES]
    if not found:
        return "The run has no figures of this step."
    rows = [(split, *values) for split, values in found.items()]
    return tabulate(rows, ("split", *_FIGURES), "github", ".4f")

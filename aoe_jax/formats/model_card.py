"""Writes the `README.md` of an exported, converted or pruned model, for the Hugging Face hub."""

from pathlib import Path

from tabulate import tabulate

from aoe_jax.config.run import Config
from aoe_jax.formats.architectures import OWN
from aoe_jax.formats.configs import computed_fields
from aoe_jax.model.counts import parameter_counts
from aoe_jax.storage.files import COUNT, TEXT, or_none, read_json

_FIGURES = ("nll", "perplexity", "bits_per_byte")
_SUMMARY = {"metrics": {"step": COUNT}}
_EVAL = {"split": TEXT, "data": or_none(TEXT), "step": or_none(COUNT)}
_LOADED = """
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
# A decoder-only language model of `aoe_jax`

The model (experts.kind={kind!r}) has {counts}.

## Configuration

{fields}

{origin}

## Use

In the commands and the code, DIR is this directory. {classes}
With `aoe_jax`:

    python -m aoe_jax.generate --workdir=DIR --prompt='...'
    python -m aoe_jax.eval --workdir=DIR --tasks=piqa
    python -m aoe_jax.finetune --model=DIR --workdir=runs/new
"""


def training(config: Config, workdir: Path, step: int) -> str:
    """Returns the section "Training" of a card. Its table contains the metrics from `workdir` that
    were measured at this step on the run's own corpora.
    """
    rows = []
    if (workdir / "summary.json").exists():
        metrics = read_json(workdir / "summary.json", "remove it", _SUMMARY)["metrics"]
        if metrics["step"] == step:
            rows.append(["validation", *(metrics.get(f"validation_{f}") for f in _FIGURES)])
    if (workdir / "eval.json").exists():
        report = read_json(workdir / "eval.json", "remove it", _EVAL)
        if report["step"] == step and report["data"] is None:
            rows.append([report["split"], *map(report.get, _FIGURES)])
    sources = ", ".join(source.label for source in config.data.sources)
    tokens = f"{step * config.tokens_per_step:,} tokens in {step:,} steps"
    table = tabulate(rows, ("split", *_FIGURES), "github", ".4f")
    seen = f"{tokens}, sequences of {config.data.seq_len} tokens, from: {sources}."
    return f"## Training\n\n{seen}\n\n{table}"


def write_card(directory: Path, config: Config, origin: str):
    """Writes the card of the model in a directory. `origin` is the section about the training of
    the model, or about the command that made the model.
    """
    values = read_json(directory / "config.json")
    library, trust = "transformers", ""
    classes = f"`transformers` loads it as `{values['architectures'][0]}`:\n"
    if "auto_map" in values:
        trust = ", trust_remote_code=True"
        classes = "`transformers` loads it with `modeling_aoe.py`:\n"
    if values["model_type"] == OWN and not trust:
        library, classes = "aoe_jax", "`transformers` has no class for this model.\n"
    else:
        classes += _LOADED.format(trust=trust)
    fields = {"model.max_len": config.model.max_len} | computed_fields(config)
    card = _CARD.format(
        library=library,
        kind=config.experts.kind,
        counts=parameter_counts(config),
        fields=tabulate(fields.items(), ("field", "value"), "github", missingval="None"),
        origin=origin,
        classes=classes,
    )
    (directory / "README.md").write_text(card)

"""Results of suites at any sizes without training: invented files of finished runs."""

import itertools
import json

from aoe_jax.compare.report import to_markdown
from aoe_jax.compare.results import read_results
from aoe_jax.compare.suite import Size, Suite
from aoe_jax.compare.train_runs import folder_of
from aoe_jax.config.run import Config
from aoe_jax.model.counts import training_flops_per_token
from aoe_jax.storage.files import write_json
from configs import tiny
from configs.compare.arms import DENSE, DENSE_ACTIVE, aoe, moe

ARMS = {"moe": moe("aux"), "aoe": aoe(4, "aux"), "dense": DENSE, "active": DENSE_ACTIVE}


def size_at(flops, width):
    """A size with that many FLOPs for the MoE, by its number of steps."""
    model = {"d_model": width, "n_layers": 2, "vocab_size": 512}
    changes = {"model": model, "experts": {"d_ffn": 2 * width}}
    config = tiny.get_config("moe")
    for group, values in changes.items():
        config[group].update(values)
    tokens = config.train.batch_size * config.data.seq_len
    per_step = training_flops_per_token(Config.from_config_dict(config)) * tokens
    return Size(changes | {"train": {"steps": round(flops / per_step)}}, seeds=2)


def results(folder, sizes, nll, arms=ARMS, curve=((1, 2), (6.0, 5.0)), seconds=lambda run: 1.0):
    """Results of a suite with these sizes, all of whose runs have finished.

    The final `nll` and the `seconds` of a step are functions of a run. `curve` is `(steps, nlls)`
    of both splits.
    """
    suite = Suite("s", tiny.get_config("published"), arms, sizes, baseline="moe")
    for run in suite.runs():
        of_run = folder_of(folder, run)
        of_run.mkdir(parents=True, exist_ok=True)
        metrics = {"step": run.config.train.steps, "validation_nll": nll(run)}
        write_json(of_run / "summary.json", {"metrics": metrics, "memory": {}})
        speed = {"tokens_per_second": run.config.tokens_per_step / seconds(run)}
        lines = [
            json.dumps(speed | {"step": step} | dict.fromkeys(("loss", "nll", "validation_nll"), y))
            for step, y in zip(*curve, strict=True)
        ]
        (of_run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    return read_results(suite, folder)


def markdown(found):
    """The report without its machine."""
    return to_markdown(found, {}, command="command")[0]


def table(text, heading):
    """The cells of the first table after a heading of a report."""
    lines = text[text.index(f"# {heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]

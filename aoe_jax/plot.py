"""Draws loss, load of experts and speed of training runs in one picture.

    python -m aoe_jax.plot --runs=DIR,DIR,... [--output=FILE.png]

The runs may still be training.
"""

from absl import flags

from aoe_jax import cli
from aoe_jax.config.checks import require_flag
from aoe_jax.storage.files import read_metrics
from aoe_jax.storage.paths import parsed_path

_RUNS = flags.DEFINE_list("runs", None, "the directories of training runs, separated by commas")
_OUTPUT = flags.DEFINE_string("output", "runs.png", "the picture, a PNG file")


def main():
    require_flag(_OUTPUT.value.endswith(".png"), "output", _OUTPUT.value, "must end in .png")
    output, runs = cli.file_to_write(_OUTPUT), {}
    for given in cli.required(_RUNS):
        run = parsed_path(given, "--runs", in_store=True)
        require_flag(run.is_dir(), "runs", given, "there is no such folder")
        lines = list(read_metrics(run / "metrics.jsonl"))
        logged = any(line.get("nll") is not None for line in lines)
        require_flag(logged, "runs", given, "metrics.jsonl there has no step yet, or is missing")
        name = run.absolute().name
        runs[given if name in runs else name] = lines
    from aoe_jax.training.picture import draw_runs, write_png  # slow to import

    write_png(output, draw_runs(runs, title=name if len(runs) == 1 else ""))
    print(f"wrote {output}")


command = cli.command(main)

"""A soak test: real training processes that are killed at random moments must end in the same state
as one that is not.

`python -m benchmarks.soak --workdir=DIR [--kills=50] [--terms=20] [--seed=0] [--json=FILE]`: first
a small model is trained without a break. Then the same run is started over and over, and killed
(SIGKILL) or asked to stop (SIGTERM) right after its start, while its data is prepared, in its
steps, or while it saves. When the run reaches its end, it is compared with the first, bit for bit:
the metrics, every line of metrics.jsonl except its timing, the position in the data and the
fingerprints of all arrays of the last checkpoint. Then the next run begins. After every stop each
complete checkpoint is read whole. The program fails at the first difference, unreadable checkpoint
or wrong exit status.
"""

from absl import flags

from aoe_jax import cli
from benchmarks.stopped_runs import soak
from benchmarks.timing import new_workdir, report

_WORKDIR = flags.DEFINE_string("workdir", None, "a directory for the runs")
_KILLS = flags.DEFINE_integer("kills", 50, "how often a process is killed", lower_bound=0)
_TERMS = flags.DEFINE_integer("terms", 20, "how often a process is asked to stop", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of the moments")
_JSON = flags.DEFINE_string("json", None, "a file for the figures")


def main():
    """Soaks."""
    root = new_workdir(_WORKDIR)
    figures = soak(root, _KILLS.value, _TERMS.value, _SEED.value)
    print(
        f"{figures['kills']} kills and {figures['terms']} requests to stop over "
        f"{figures['runs_finished']} run(s): all ended bit for bit as the run without a break, and "
        "every checkpoint could be read"
    )
    for what, count in figures["stops"].items():
        print(f"{count:4d}  {what}")
    report(figures, _JSON.value)


if __name__ == "__main__":
    cli.run(main)

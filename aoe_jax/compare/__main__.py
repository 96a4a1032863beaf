"""Runs a suite and reports: `python -m aoe_jax.compare --suite=configs/compare/NAME.py
--workdir=DIR`.

Arms x sizes x seeds of the suite are trained, several at a time, each on a core of its own; what is
finished isn't run again, so the same command goes on after a stop. `--report` only makes the report
again: `DIR/report.md`, the self-contained `DIR/report.html`, CSVs, and the figures as PNG and SVG.
`--set=GROUP.FIELD=VALUE` changes a setting of all runs.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.suite import load_suite
from aoe_jax.errors import UserError
from aoe_jax.locking import alone_in
from aoe_jax.stopping import StopRequests

_SUITE = flags.DEFINE_string(
    "suite", None, "a file with get_suite(), such as configs/compare/tiny.py"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "a directory for runs and report; one with runs goes on from them"
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "runs at a time, which share out GPUs; by default one a CPU core, one elsewhere",
    1,
)
_REPORT = flags.DEFINE_bool("report", False, "train nothing, only make the report of what there is")
_SET = flags.DEFINE_multi_string(
    "set", [], "GROUP.FIELD=VALUE for all runs, such as data.path=/data/c4"
)


def main():
    """Trains what is missing, and reports."""
    stop = StopRequests("the same command goes on from there")
    stop.listen()
    suite = load_suite(Path(cli.required(_SUITE)), _SET.value)
    workdir = Path(cli.required(_WORKDIR)).expanduser().absolute()
    if _REPORT.value and not (workdir / "machine.json").exists():
        raise UserError(
            f"--workdir={workdir}: has no runs to report; leave out --report to train them"
        )
    from aoe_jax.compare.report import write_report
    from aoe_jax.compare.runs import train_suite
    from aoe_jax.training.workdir import make_workdir

    make_workdir(workdir)
    with alone_in(workdir, "workdir"):
        if not _REPORT.value:
            train_suite(suite, workdir, _JOBS.value, stop)
        settings = "".join(f" --set={setting}" for setting in _SET.value)
        print(
            write_report(
                suite,
                workdir,
                f"python -m aoe_jax.compare --suite={_SUITE.value} --workdir=DIR{settings}",
            )
        )


if __name__ == "__main__":
    cli.run(main)

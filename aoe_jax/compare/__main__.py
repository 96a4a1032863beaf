"""Compares methods: trains a suite of runs and reports.

    python -m aoe_jax.compare --suite=configs/compare/NAME.py --workdir=DIR

Trains every arm of the suite at every size with every seed. On CPU, each core trains one run at a
time; elsewhere, a run takes all devices. Finished runs are not repeated, so the same command
continues a stopped suite. `--report` trains nothing and only writes the report: `DIR/report.md`,
`DIR/report.html` (one file), CSV files, and pictures as PNG and SVG. `--set=GROUP.FIELD=VALUE`
changes a setting of all runs. `--arms=ARM,ARM` trains these arms only, and the arms that they are
compared with.

    python -m aoe_jax.compare --workdir=DIR --arms=ARM,ARM

Compares any two arms from the `runs.csv` of a report, for example with `DIR=results/small`.
"""

import shlex

from absl import flags

from aoe_jax import cli
from aoe_jax.compare.suite import load_suite
from aoe_jax.config.checks import require_flag
from aoe_jax.storage.lease import leased

_SUITE = flags.DEFINE_string("suite", None, "FILE.py, or aoe_jax:NAME such as aoe_jax:tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of the runs and the report")
_ENGINE = cli.define_engine_flag()
_REPORT = flags.DEFINE_bool("report", False, "write the report of finished runs, train nothing")
_SET = flags.DEFINE_multi_string("set", [], "GROUP.FIELD=VALUE, such as data.path=/data/c4")
_ARMS = flags.DEFINE_list("arms", [], "names of arms of the suite; without --suite, two")


def main():
    cli.refuse_empty(_ARMS)
    if _ARMS.present and not _SUITE.present:
        cli.refuse("give it with --suite", _REPORT, _SET, _ENGINE)
        from aoe_jax.compare.pair import pair_table

        print(pair_table(cli.path_of(_WORKDIR), _ARMS.value))
        return
    suite = load_suite(cli.path_of(_SUITE), _SET.value)
    workdir = cli.path_of(_WORKDIR).absolute()
    has_runs = (workdir / "machine.json").exists() or not _REPORT.value
    wanted = "has no runs to report; leave out --report to train them"
    require_flag(has_runs, "workdir", workdir, wanted)
    suite = suite.of_arms(_ARMS.value) if _ARMS.value else suite
    suite.runs()  # checks all configurations before anything is written
    for name in suite.throughput:
        suite.swept(name)
    from aoe_jax.compare.jobs import Machine
    from aoe_jax.compare.measure import measure_suite
    from aoe_jax.compare.report import write_report
    from aoe_jax.compare.train_runs import train_suite

    given = [f"--suite={_SUITE.value}", *(f"--set={setting}" for setting in _SET.value)]
    with leased(workdir, "workdir"):
        if not _REPORT.value:
            machine = Machine.of_engine(_ENGINE.value, workdir)
            train_suite(suite, workdir, machine)
            measure_suite(suite, workdir, machine, given)
        given += [f"--arms={','.join(_ARMS.value)}"] if _ARMS.value else []
        command = ["python", "-m", "aoe_jax.compare", *given, "--workdir=DIR"]
        print(write_report(suite, workdir, shlex.join(command)))


command = cli.command(main)

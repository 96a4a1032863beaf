"""Checks devices, kernels and a training step on this machine.

    python -m aoe_jax.doctor [--config=FILE[:VARIANT]] [--json=FILE]

The command prints devices, versions, and the chosen backends with reasons. It compares kernels and
the expert layer with plain JAX code at the shapes of the configuration, and runs ten training steps
of at most 16,384 tokens, or of one longer sequence, per device. Each check prints whether it passed
and, if a kernel fails, the setting that avoids it. Exit status 1: a check failed.

All devices work at the same time on the mesh of the configuration. The default configuration is
`configs/tiny.py` on CPU and `configs/doctor.py` on accelerators. `--config.GROUP.FIELD=VALUE`,
`--distributed` and `--coordinator` have the same meaning as in training.
"""

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.storage.files import write_json

_CONFIG = cli.define_config_flag()
_JSON = flags.DEFINE_string("json", None, "a file for the report")


def main():
    file = cli.file_to_write(_JSON)
    distributed.start()
    import jax  # JAX must not be used before `distributed.start`

    from aoe_jax.data.tokenised import with_vocabulary
    from aoe_jax.planning.examination import examine

    on_cpu = jax.default_backend() == "cpu"
    default = "aoe_jax:tiny" if on_cpu else "aoe_jax:doctor"
    config = with_vocabulary(cli.parsed_config(_CONFIG, default))
    first = jax.process_index() == 0

    def show(line):
        if first:
            print(line, flush=True)

    report = examine(config, show)
    if file and first:
        write_json(file, report)
    return 0 if report["passed"] else 1


command = cli.command(main)

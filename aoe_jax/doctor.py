"""Checks devices, kernels and a training step on this machine.

    python -m aoe_jax.doctor [--config=FILE[:VARIANT]] [--json=FILE]

It prints devices, versions, and each backend with the reason for its choice, and checks kernels
and the layer of experts against plain references at the shapes of the configuration. It takes ten
training steps of at most 16,384 tokens a device, but at least one sequence. Each check prints its
verdict, and the setting to use instead of a kernel that fails. Exit status 1: a check failed.

All devices work at the same time on the mesh of the configuration, by default `configs/tiny.py` on
CPU and `configs/doctor.py` elsewhere. `--config.GROUP.FIELD=VALUE`, `--distributed` and
`--coordinator` work like in training.
"""

from absl import flags

from aoe_jax import cli, distributed
from aoe_jax.storage.files import write_json

_CONFIG = cli.define_config_flag()
_JSON = flags.DEFINE_string("json", None, "a file for the report")


def main():
    file = cli.file_to_write(_JSON)
    distributed.start()
    import jax  # may start only after `distributed.start`

    from aoe_jax.planning.examination import examine

    on_cpu = jax.default_backend() == "cpu"
    config = cli.parsed_config(_CONFIG, "configs/tiny.py" if on_cpu else "configs/doctor.py")
    first = jax.process_index() == 0

    def show(line):
        if first:
            print(line, flush=True)

    report = examine(config, show)
    if file and first:
        write_json(file, report)
    return 0 if report["passed"] else 1


command = cli.command(main)

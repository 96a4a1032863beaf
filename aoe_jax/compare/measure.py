"""Looks at runs in a process of its own: `python -m aoe_jax.compare.measure --routing=RUN`, or `--steps=FILE --output=FILE`.

`--routing` writes `RUN/routing.json`, see `routing.py`; `--steps` times configurations, see `step_times.py`.
"""

from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.config import Config
from aoe_jax.json_files import read_json
from aoe_jax.stopping import StopRequests

_ROUTING = flags.DEFINE_string("routing", None, "the directory of a training run")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "tokens of the validation split to route, about", 1)
_STEPS = flags.DEFINE_string("steps", None, "a JSON file of configurations by name")
_OUTPUT = flags.DEFINE_string("output", None, "where the seconds of a step go")


def main():
    """Measures."""
    StopRequests("the same command starts anew").listen()
    if _STEPS.value:
        output = Path(cli.required(_OUTPUT))
        configs = {arm: Config.from_config_dict(groups) for arm, groups in read_json(Path(_STEPS.value)).items()}
        from aoe_jax.compare.step_times import time_steps

        for arm, seconds in time_steps(configs, output).items():
            print(f"{arm}: {seconds:.4f} s a step")
    else:
        workdir = Path(cli.required(_ROUTING))
        from aoe_jax.compare.routing import analyse

        last = analyse(workdir, _TOKENS.value)["checkpoints"][-1]
        print(f"step {last['step']}: {sum(last['dead_experts'])} dead experts")


if __name__ == "__main__":
    cli.run(main)

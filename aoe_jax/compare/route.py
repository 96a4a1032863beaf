"""Looks at how a run routes tokens: `python -m aoe_jax.compare.route --workdir=RUN`; writes `RUN/routing.json`."""

from pathlib import Path

import numpy as np
from absl import flags

from aoe_jax import cli
from aoe_jax.stopping import StopRequests

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a training run")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "tokens of the validation split to route, about", 1)


def main():
    """Analyses."""
    StopRequests("the same command starts anew").listen()
    workdir = Path(cli.required(_WORKDIR))
    from aoe_jax.compare.routing import analyse

    last = analyse(workdir, _TOKENS.value)["checkpoints"][-1]
    print(
        f"step {last['step']}: Ent_load {np.mean(last['load_entropy']):.3f}, {sum(last['dead_experts'])} dead experts"
    )


if __name__ == "__main__":
    cli.run(main)

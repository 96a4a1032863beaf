"""What a training step of each arm costs along the sweeps of a suite, measured here or traced for
machines that aren't here.

On this machine: the seconds of a step of random tokens, all arms in turn (`step_times.py`), and the
memory that the compiler plans. For a topology, by `aoe_jax.plan`: the least seconds that public
peak figures allow, and the bytes that a chip receives. Devices that share a machine's cores would
say nothing of more chips.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aoe_jax.compare.suite import Suite
from aoe_jax.config import Config
from aoe_jax.counts import training_flops_per_token
from aoe_jax.json_files import read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """A training step of an arm at one value of a sweep."""

    x: float  # where the value lies on the axis
    config: Config
    seconds: float
    memory_bytes: (
        float | None
    )  # of a device: state and temporaries; None where the step is traced only
    received_bytes: float | None  # by a chip; None on this machine

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.config.tokens_per_step

    @property
    def tokens_per_second(self):
        """Of all devices."""
        return self.tokens / self.seconds

    @property
    def flops(self):
        """Useful FLOPs of a step."""
        return self.tokens * training_flops_per_token(self.config)


def sweep_file(workdir: Path, name):
    """What is measured of a sweep."""
    return workdir / "measured" / f"throughput_{name}.json"


def _measured(suite, workdir, name):
    """`[(value, its configurations by arm, its figures by arm)]`; figures are None where there are
    none for these.
    """
    file = sweep_file(workdir, name)
    done = {}
    for point in read_json(file)["points"] if file.exists() else []:
        # As configurations: what was saved before may lack fields that are new.
        configs = {arm: Config.from_config_dict(groups) for arm, groups in point["configs"].items()}
        done[point["value"]] = configs, point["figures"]
    for value, configs in suite.swept(name).items():
        of, figures = done.get(value, (None, None))
        yield value, configs, figures if of == configs else None


def missing_points(suite: Suite, workdir: Path, name):
    """The points of a sweep that aren't measured yet, as JSON has them, for `measure_points`."""
    return [
        {"value": value, "configs": {arm: config.to_dict() for arm, config in configs.items()}}
        for value, configs, figures in _measured(suite, workdir, name)
        if figures is None
    ]


def read_costs(suite: Suite, workdir: Path, name):
    """`{arm: [Cost, ...]}` of a sweep, of the values that have been measured."""
    sweep, found = suite.throughput[name], {}
    for _, configs, figures in _measured(suite, workdir, name):
        for arm, of_arm in (figures or {}).items():
            config = configs[arm]
            cost = Cost(
                sweep.position(config),
                config,
                of_arm["seconds"],
                of_arm.get("memory_bytes"),
                of_arm.get("received_bytes"),
            )
            found.setdefault(arm, []).append(cost)
    return found


def measure_points(points, is_topology, output: Path):
    """Measures points of a sweep one by one, and adds each to a JSON file; one that fails stops no
    other.

    Args:
      points: of `missing_points`.
      is_topology: whether their values are machines that aren't here.
      output: the file.

    Returns:
      What failed, a line each.
    """
    measure, failed = _traced if is_topology else _timed, []
    for point in points:
        configs = {arm: Config.from_config_dict(groups) for arm, groups in point["configs"].items()}
        try:
            figures = measure(point["value"], configs)
        except Exception as e:  # such as want of memory
            log.exception("%s", point["value"])
            failed.append(f"{point['value']}: {type(e).__name__}: {e}")
            continue
        done = read_json(output)["points"] if output.exists() else []
        done = [d for d in done if d["value"] != point["value"]]
        write_json(output, {"points": [*done, point | {"figures": figures}]})
        log.info(
            "%s: %s",
            point["value"],
            ", ".join(f"{arm} {of['seconds']:.4g} s" for arm, of in figures.items()),
        )
    return failed


def _timed(_, configs: Mapping[str, Config]):
    from aoe_jax.compare.step_times import RepeatedStep, seconds_in_turn

    steps = {arm: RepeatedStep(config) for arm, config in configs.items()}
    seconds = seconds_in_turn(steps)
    return {
        arm: {
            "seconds": seconds[arm],
            "memory_bytes": step.memory["state_bytes"] + step.memory["temporary_bytes"],
        }
        for arm, step in steps.items()
    }


def _traced(topology, configs: Mapping[str, Config]):
    from aoe_jax.plan import plan
    from aoe_jax.sharding import fill_mesh
    from aoe_jax.topology import topology_devices

    generation, devices = topology_devices(topology)
    filled = {arm: fill_mesh(config, len(devices)) for arm, config in configs.items()}
    plans = {
        arm: plan(config, generation, devices, compiles=False) for arm, config in filled.items()
    }
    return {
        arm: {
            "seconds": found["step_seconds"],
            "received_bytes": sum(found["collective_bytes"].values()),
            "bound_by": found["bound_by"],
            "mfu_bound": found["mfu_bound"],
        }
        for arm, found in plans.items()
    }


def cost_rows(suite: Suite, costs):
    """A row a sweep, value and arm, of `{name of a sweep: what read_costs returns}`."""
    for name, by_arm in costs.items():
        base = {cost.x: cost for cost in by_arm.get(suite.baseline, ())}
        for arm, of_arm in by_arm.items():
            for cost in of_arm:
                yield {
                    "sweep": name,
                    "setting": suite.throughput[name].setting,
                    "x": cost.x,
                    "arm": arm,
                    "tokens_per_step": cost.tokens,
                    "seconds_per_step": cost.seconds,
                    "tokens_per_second": cost.tokens_per_second,
                    "speed_to_baseline": cost.tokens_per_second / base[cost.x].tokens_per_second,
                    "flops_per_step": cost.flops,
                    "memory_bytes": cost.memory_bytes,
                    "received_bytes": cost.received_bytes,
                }

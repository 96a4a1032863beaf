"""One training step over 1 to 8 devices of this machine: virtual CPU devices, then processes.

`python -m benchmarks.scaling [--devices=1,2,4,8] [--process_counts=1,2] [--repeats=5]
[--json=FILE]`. The batch and the model stay the same (configs/tiny.py, AoE), so the devices share
the work of one. Virtual devices share the cores, so the times show the cost of splitting the work.
Each mesh runs in processes of its own, after the baseline of one device.
"""

import json
import os
import socket
import subprocess
import sys

from absl import flags

from aoe_jax import distributed
from aoe_jax.config.checks import require_flag
from aoe_jax.errors import UserError
from aoe_jax.training.step_times import RepeatedStep
from benchmarks.timing import configuration, medians, report, run_benchmark

_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "virtual devices of one process")
_PROCESS_COUNTS = flags.DEFINE_list("process_counts", ["1", "2"], "processes of one device each")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed steps of each", lower_bound=1)
_WORKER = flags.DEFINE_string("worker", None, "internal: the mesh to time, as JSON")

MESHES = {
    "data": lambda n: {"data": n},
    "fsdp": lambda n: {"data": 1, "fsdp": n},
    "expert, ring": lambda n: {"data": 1, "expert": n},
    "expert, all_to_all": lambda n: {"data": 1, "expert": n, "transport": "all_to_all"},
}


def time_steps(mesh, repeats):
    """Median seconds of a training step of configs/tiny.py on a mesh of all joined processes."""
    step = RepeatedStep(configuration("aoe", {"mesh": mesh, "model": {"unroll": 1}}))
    return medians({"step": step}, repeats)["step"]


def run_workers(mesh, n_devices, n_processes):
    """Seconds of a step, from the first of `n_processes` with `n_devices` each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(n_devices)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        f"--worker={json.dumps(mesh)}",
        f"--repeats={_REPEATS.value}",
    ]
    if n_processes > 1:
        command += [f"--coordinator=localhost:{port}", f"--processes={n_processes}"]
    workers = [
        subprocess.Popen(
            [*command, *([f"--process={i}"] if n_processes > 1 else [])],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(n_processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise UserError(f"--worker: a step on {mesh} failed, see above")
    return float(outputs[0].split()[-1])


def main():
    if _WORKER.value:
        distributed.start()
        print(time_steps(json.loads(_WORKER.value), _REPEATS.value))
        return
    for name, values in (("devices", _DEVICES.value), ("process_counts", _PROCESS_COUNTS.value)):
        wanted = "numbers of 1, 2, 4 and 8, which divide the batch"
        require_flag({*values} <= {"1", "2", "4", "8"}, name, ",".join(values), wanted)
    cases = [(name, int(n), 1) for n in _DEVICES.value for name in MESHES if int(n) > 1]
    cases += [("data", 1, int(n)) for n in _PROCESS_COUNTS.value if int(n) > 1]
    figures = []
    for name, n_devices, n_processes in cases:
        alone = run_workers({"data": 1}, 1, 1)
        seconds = run_workers(MESHES[name](n_devices * n_processes), n_devices, n_processes)
        figure = {
            "mesh": name,
            "devices": n_devices,
            "processes": n_processes,
            "ms": 1e3 * seconds,
            "ratio": seconds / alone,
        }
        figures.append(figure)
        processes = "processes" if n_processes > 1 else "process"
        print(
            f"{n_processes} {processes} x {n_devices} devices along {name:<18}: "
            f"{1e3 * seconds:7.0f} ms, {seconds / alone:.2f}x one device",
            flush=True,
        )
    report(figures)


if __name__ == "__main__":
    run_benchmark(main)

"""Work on a Ray cluster of which a node is killed: the files are those of one machine."""

import os
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest

from tests.compare.suites import write_suite
from tests.compare.test_whole_suite import ended
from tests.data.texts import LLAMA, json_lines, texts
from tests.hasty import xla_flags
from tests.in_process import execute
from tests.runs import contents, finish, start, succeed, wait_for

pytestmark = pytest.mark.slow

# The first node has no cores, so tasks run on nodes that a test adds.
NODES = """
import sys
from ray.cluster_utils import Cluster
cluster, nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), []
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "add\\n":
        nodes.append(cluster.add_node(num_cpus=1))
    else:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""


class Cluster:
    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        soon = {f"RAY_health_check_{name}_ms": "300" for name in ("initial_delay", "period")}
        pipes["env"] = os.environ | {"XLA_FLAGS": xla_flags()} | soon
        self.process = subprocess.Popen([sys.executable, "-c", NODES], text=True, **pipes)
        self.address = self.process.stdout.readline().strip()

    def change(self, how):
        """Adds a node, or kills the oldest."""
        print(how, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.process.communicate(timeout=60)


def begin(cluster, command):
    address = {"RAY_ADDRESS": cluster.address}
    return start([*command, "--engine=ray"], forked=False, **address)


def finish_without_first_node(cluster, command, is_at_work):
    """Runs a command on one node and, once `is_at_work()`, on another. Returns its stderr."""
    cluster.change("add")
    process = begin(cluster, command)
    wait_for(process, is_at_work)
    cluster.change("kill")
    cluster.change("add")
    status, _, stderr = finish(process)
    assert status == 0, stderr
    assert "so the task will be retried" in stderr
    return stderr


def test_a_preparation(cluster, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_bytes(json_lines(texts(8600, i, longest=140)))
    one, two = tmp_path / "one" / "store", tmp_path / "two" / "store"
    command = ["-m", "aoe_jax.prepare", f"--input={tmp_path}/*.jsonl", "--tokenizer=bpe:300"]
    succeed([*command, f"--output={one}", "--processes=1"])
    stderr = finish_without_first_node(
        cluster, [*command, f"--output={two}"], lambda: [*two.glob("units/*.partial-*")]
    )
    assert "preparing: 100%" in stderr and contents(two) == contents(one)


def test_a_suite(cluster, tmp_path):
    size = 'Size({}, seeds=1, arms=("moe", "broken"))'
    suite = write_suite(tmp_path / "suite.py", f'sizes={{"a": {size}}}')
    here, work = ended()[0] / "work", tmp_path / "work"  # a larger suite, without Ray
    command = ["-m", "aoe_jax.compare", f"--suite={suite}", f"--workdir={work}"]
    checkpoints = "runs/a/*/*/checkpoints/*/_CHECKPOINT_METADATA"
    stderr = finish_without_first_node(cluster, command, lambda: [*work.glob(checkpoints)])
    assert "2 of 2 jobs ended, 1 failed" in stderr
    frames = [pd.read_csv(folder / "runs.csv", dtype=str) for folder in (here, work)]
    is_in_both = (frames[0]["seed"] == "0") & (frames[0]["arm"] != "aoe")
    frames[0] = frames[0][is_in_both].reset_index(drop=True)
    timed = ["seconds_per_step", "tokens_per_second", "memory_bytes"]
    pd.testing.assert_frame_equal(*(frame.drop(columns=timed) for frame in frames))
    assert set(frames[1]["state"]) == {"finished", "failed"}


def test_a_mistake_in_a_task(cluster, tmp_path):
    """The command ends with the line that it would have on one machine."""
    lines = json_lines(texts(2000, 0, longest=140))
    (tmp_path / "a.jsonl").write_bytes(lines + b'{"text": 7}\n')
    command = ["-m", "aoe_jax.prepare", f"--input={tmp_path}/*.jsonl", f"--tokenizer={LLAMA}"]
    cluster.change("add")
    here = start([*command, f"--output={tmp_path}/here"])
    there = begin(cluster, [*command, f"--output={tmp_path}/there"])
    (status, _, stderr), (status_there, _, stderr_there) = finish(here), finish(there)
    message = stderr.splitlines()[-1]
    assert (status, status_there) == (2, 2) and "a.jsonl" in message
    assert stderr_there.splitlines()[-1] == message


def test_a_stopped_suite_asks_its_runs_to_stop(cluster, tmp_path):
    suite = write_suite(tmp_path / "suite.py", train__steps=10_000)
    command = ["-m", "aoe_jax.compare", f"--suite={suite}", f"--workdir={tmp_path}/work"]
    cluster.change("add")
    process, log = begin(cluster, command), tmp_path / "work" / "runs" / "a" / "moe" / "seed_0.log"
    wait_for(process, lambda: log.exists() and "step 2/" in log.read_text())
    process.send_signal(signal.SIGTERM)
    status, _, stderr = finish(process)
    assert status == 0, stderr
    assert ": the work so far is saved; the same command" in stderr.splitlines()[-1]
    assert "preempted" in log.read_text().splitlines()[-1]


def test_a_cluster_without_cores(cluster, tmp_path):
    suite = write_suite(tmp_path / "suite.py")
    command = ["-m", "aoe_jax.compare", f"--suite={suite}", f"--workdir={tmp_path}/work"]
    status, _, stderr = finish(begin(cluster, command))
    wanted = "error: --engine=ray: no node of the cluster has CPU cores; add one"
    assert (status, stderr.splitlines()[-1]) == (2, wanted)


def test_without_a_cluster(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(2000, 0)))
    command = ["-m", "aoe_jax.prepare", f"--input={tmp_path}/a.jsonl", "--tokenizer=bpe:300"]
    command += [f"--output={tmp_path}/store", "--engine=ray"]
    status, _, stderr = execute([*command, "--processes=1"])
    wanted = "leave it out with --engine=ray, which uses all free cores"
    assert (status, stderr) == (2, f"error: --processes=1: {wanted}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    process = start(command, forked=False, RAY_ADDRESS=f"127.0.0.1:{closed}")
    status, _, stderr = finish(process)
    assert status == 2
    assert stderr.splitlines()[-1].startswith("error: --engine=ray: no Ray cluster answers (")

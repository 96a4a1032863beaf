"""Faults below Python, in real processes: which error, at which place, and what comes of it."""

import errno
import shutil
import subprocess
import time

import pytest

from aoe_jax.conversion.exporting import export
from aoe_jax.errors import MachineFault
from tests.processes import DENSE_FSDP, free_port, two_dense_processes
from tests.runs import (
    EVERY,
    ROOT,
    STEPS,
    contents,
    corpus_folder,
    dense_command,
    dense_run,
    finish,
    finished_run,
    run,
    same_end,
    scratch,
    shared,
    start,
)
from tests.test_promises import last_line

pytestmark = pytest.mark.slow

LASTS = 0.7  # seconds of a fault that passes: the second try fails too


@shared
def faulty_disk():
    """The library that makes a disk fail."""
    library = scratch("faulty") / "faulty_disk.so"
    source = ROOT / "tests" / "faulty_disk.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


class Fault:
    """A fault of some operations on paths with a part; it holds from `begin` to `end`."""

    def __init__(self, tmp_path, code, operations, part):
        self._flag = tmp_path / "fails"
        number = -1 if code == "HANG" else getattr(errno, code, 0)
        fault = f"{number}:{operations}:{part}:{self._flag}"
        self.variables = {"LD_PRELOAD": faulty_disk(), "FAULT": fault}
        self.begin()

    def begin(self):
        self._flag.touch()

    def end(self):
        self._flag.unlink()

    def lasting(self, command):
        """Runs a command while the fault holds."""
        return finish(start([*command, "--retry_seconds=1"], **self.variables))

    def passing(self, command, seen):
        """Runs a command; the fault ends some time after the command has logged `seen`."""
        path = self._flag.with_name("stderr")
        with path.open("w") as stderr:
            process = start([*command, "--retry_seconds=60"], stderr=stderr, **self.variables)
            deadline = time.monotonic() + 60
            while seen not in path.read_text() and time.monotonic() < deadline:
                assert process.poll() is None, path.read_text()
                time.sleep(0.05)
            time.sleep(LASTS)
            self.end()
            status, stdout, _ = finish(process)
        return status, stdout, path.read_text()


def stopped_run(folder):
    """A run that has a step left."""
    return shutil.copytree(dense_run(), folder), dense_command(folder, train__steps=STEPS + 1)


STATE = f"checkpoints/{STEPS}/"
SHARD = "-00000.array_record"
READS = [  # error, operations, part of the path
    ("EIO", "o", "run/config.json"),
    ("ESTALE", "o", "run/heartbeat.json"),
    ("ENOTCONN", "or", STATE + "state"),
    ("ETIMEDOUT", "or", STATE + "state"),
    ("EBUSY", "o", STATE),
    ("EIO", "r", STATE + "state"),
    ("ECONNRESET", "o", STATE + "run"),
    ("ESTALE", "o", SHARD),
    ("EIO", "r", SHARD),
    ("ENOTCONN", "d", "run/checkpoints"),
    ("EIO", "o", "run/owner"),
]
WRITES = [
    ("ENOSPC", "w", "checkpoints/"),
    ("EDQUOT", "w", "checkpoints/"),
    ("EROFS", "cm", "checkpoints/"),
    ("EIO", "w", "checkpoints/"),
    ("ETIMEDOUT", "m", "checkpoints/"),
    ("ENOSPC", "w", "run/metrics.jsonl"),
    ("EIO", "w", "run/metrics.jsonl"),
]
NEEDLESS = [
    ("EROFS", "c", "heartbeat.json"),
    ("ENOSPC", "w", "heartbeat.json"),
    ("EIO", "w", "tensorboard/"),
]


def ids(cases):
    return {"argvalues": cases, "ids": [" ".join(case) for case in cases]}


@pytest.mark.parametrize("case", **ids(READS))
def test_reads_that_fail(tmp_path, case):
    """A lasting fault ends the run and changes no file; the next run goes on."""
    workdir, command = stopped_run(tmp_path / "run")
    fault, before = Fault(tmp_path, *case), contents(workdir)
    status, _, stderr = fault.lasting(command)
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert contents(workdir) == before
    if case != READS[0] and case[2] != SHARD:  # the files are as before: one next run is enough
        return
    fault.end()
    status, _, stderr = run(command)
    assert status == 0 and f"going on from step {STEPS}" in stderr, stderr
    assert not (workdir / "damaged_checkpoints").exists()


def test_a_read_that_fails_for_a_while(tmp_path):
    workdir, command = stopped_run(tmp_path / "run")
    fault = Fault(tmp_path, "ENOTCONN", "or", STATE)
    status, _, stderr = fault.passing(command, "cannot be read")
    assert status == 0 and f"going on from step {STEPS}" in stderr, stderr
    assert not (workdir / "damaged_checkpoints").exists()


@pytest.mark.parametrize("operation", ["o", "r"])
def test_data_that_fails_for_a_while(tmp_path, operation):
    """The first batch, of a store that is complete."""
    dense_run()
    fault = Fault(tmp_path, "EIO", operation, SHARD)
    status, _, stderr = fault.passing(dense_command(tmp_path / "run"), "cannot be read")
    assert status == 0 and same_end(tmp_path / "run", dense_run()), stderr


@pytest.mark.parametrize(
    "case", **ids([("ENOSPC", "w", "cache/tokens/"), ("EIO", "m", "cache/tokens/")])
)
def test_a_corpus_that_cannot_be_tokenised(tmp_path, case):
    """For a while, or at all."""
    command = dense_command(tmp_path / "run", data__cache=tmp_path / "cache")
    fault = Fault(tmp_path, *case)
    status, _, stderr = fault.lasting(command)
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert "cannot be opened, or tokenised in data.cache=" in last_line(stderr)
    status, _, stderr = fault.passing(command, "next try in")
    assert status == 0 and same_end(tmp_path / "run", dense_run()), stderr
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 1


def test_reads_that_are_short(tmp_path):
    """They look like a file that was cut, which is damage."""
    workdir, command = stopped_run(tmp_path / "run")
    fault = Fault(tmp_path, "short", "r", STATE + "state")
    status, _, stderr = fault.lasting(command)
    assert status == 0 and f"going on from step {STEPS - EVERY}" in stderr, stderr
    assert (workdir / "damaged_checkpoints" / str(STEPS)).is_dir()


@pytest.mark.parametrize("case", **ids(WRITES))
def test_writes_that_fail(tmp_path, case):
    """A lasting fault ends the run, which goes on later as if nothing had been."""
    workdir, command = tmp_path / "run", dense_command(tmp_path / "run")
    fault = Fault(tmp_path, *case)
    status, _, stderr = fault.lasting(command)
    assert status == MachineFault.status, stderr
    assert "the same command goes on" in last_line(stderr)
    fault.end()
    status, _, stderr = run(command)
    assert status == 0 and same_end(workdir, dense_run()), stderr


@pytest.mark.parametrize("case", ["w checkpoints/", "m checkpoints/", "w run/metrics.jsonl"])
def test_writes_that_fail_for_a_while(tmp_path, case):
    fault = Fault(tmp_path, "EIO", *case.split())
    status, _, stderr = fault.passing(dense_command(tmp_path / "run"), "cannot be")
    assert status == 0 and same_end(tmp_path / "run", dense_run()), stderr


@pytest.mark.parametrize("case", **ids(NEEDLESS))
def test_files_that_a_run_can_do_without(tmp_path, case):
    fault = Fault(tmp_path, *case)
    status, _, stderr = fault.lasting(dense_command(tmp_path / "run"))
    assert status == 0 and "cannot be written" in stderr and "the run goes on" in stderr, stderr
    assert same_end(tmp_path / "run", dense_run())


@pytest.mark.parametrize("case", **ids([("EIO", "o", STATE), ("EIO", "r", SHARD)]))
def test_evaluation(tmp_path, case):
    workdir, _ = stopped_run(tmp_path / "run")
    before = contents(workdir)
    status, _, stderr = Fault(tmp_path, *case).lasting(["eval.py", f"--workdir={workdir}"])
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert contents(workdir) == before


@pytest.mark.parametrize("part", ["run/config.json", SHARD])
def test_evaluation_while_a_disk_fails(tmp_path, part):
    workdir, _ = stopped_run(tmp_path / "run")
    command = ["eval.py", f"--workdir={workdir}", "--split=validation"]
    status, _, stderr = Fault(tmp_path, "ESTALE", "s", part).passing(command, "next try in")
    assert status == 0 and (workdir / "eval.json").exists(), stderr


@pytest.mark.parametrize("operation", "sd")
def test_a_folder_of_texts_that_fails_for_a_while(tmp_path, operation):
    """It is not taken for a path that does not exist."""
    shutil.copytree(corpus_folder(), tmp_path / "texts")
    texts = {"data__name": "text", "data__path": tmp_path / "texts", "train__steps": 1}
    fault = Fault(tmp_path, "ENOTCONN", operation, "/texts")
    status, _, stderr = fault.passing(dense_command(tmp_path / "run", **texts), "next try in")
    assert status == 0, stderr


def test_an_evaluation_that_cannot_be_written(tmp_path):
    """It is printed whole, and a read-only disk is a mistake."""
    workdir = shutil.copytree(finished_run(), tmp_path / "run")
    fault = Fault(tmp_path, "EROFS", "c", "eval.json")
    status, stdout, stderr = fault.lasting(["eval.py", f"--workdir={workdir}"])
    assert status == 2 and "bits" in stdout and "layer" in stdout, stdout
    assert (
        last_line(stderr) == f"error: --workdir={workdir} cannot be written: Read-only file system"
    )


def test_evaluation_of_a_model(tmp_path):
    """A disk that fails is not taken for a damaged model."""
    export(dense_run(), tmp_path / "model")
    command = ["eval.py", f"--workdir={tmp_path / 'model'}"]
    status, _, stderr = Fault(tmp_path, "EIO", "o", "model.safetensors").lasting(command)
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert "model.safetensors cannot be read" in stderr and "damaged" not in stderr


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO"])
def test_export(tmp_path, code):
    workdir, _ = stopped_run(tmp_path / "run")
    command = ["-m", "aoe_jax.export", f"--workdir={workdir}", f"--output={tmp_path / 'model'}"]
    status, _, stderr = Fault(tmp_path, code, "w", "model").lasting(command)
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert [path.name for path in tmp_path.iterdir() if "model" in path.name] == []


def prepare_command(output):
    return [
        *("-m", "aoe_jax.prepare", f"--input={corpus_folder()}/*.txt", "--validation=0.3"),
        *("--test=0.3", f"--output={output}", f"--tokenizer={dense_run() / 'tokenizer.json'}"),
    ]


@pytest.mark.parametrize(
    "case",
    **ids(
        [
            ("EDQUOT", "w", "store/"),
            ("EIO", "w", "store/"),
            ("EIO", "r", "texts/"),
            ("ENOTCONN", "s", "texts/"),
        ]
    ),
)
def test_preparation(tmp_path, case):
    command = prepare_command(tmp_path / "store")
    fault = Fault(tmp_path, *case)
    status, _, stderr = fault.lasting(command)
    assert status == MachineFault.status and "Traceback" not in stderr, stderr
    assert not (tmp_path / "store" / "manifest.json").exists()
    fault.end()
    status, _, stderr = run(command)
    assert status == 0 and (tmp_path / "store" / "manifest.json").exists(), stderr


@pytest.mark.parametrize("case", **ids([("EIO", "w", "store/units"), ("EIO", "r", "texts/")]))
def test_preparation_that_fails_for_a_while(tmp_path, case):
    command = prepare_command(tmp_path / "store")
    status, _, stderr = Fault(tmp_path, *case).passing(command, "next try in")
    assert status == 0 and (tmp_path / "store" / "manifest.json").exists(), stderr


@pytest.mark.parametrize(
    ("case", "process"),
    [(("EIO", "or", STATE + "state"), 1), (("ENOTCONN", "o", "run/config.json"), 0)],
)
def test_two_processes_of_which_one_cannot_begin(tmp_path, case, process):
    """Both end, with the same status; nothing is touched."""
    workdir, command = stopped_run(tmp_path / "run")
    fault, before = Fault(tmp_path, *case), contents(workdir)
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--retry_seconds=1"]
    processes = [
        start([*command, *flags, f"--process={i}"], **(fault.variables if i == process else {}))
        for i in range(2)
    ]
    outcomes = [finish(process) for process in processes]
    assert [status for status, _, _ in outcomes] == [MachineFault.status] * 2, outcomes
    assert f"process {process} failed; see its log" in outcomes[1 - process][2]
    assert contents(workdir) == before


@pytest.mark.parametrize("process", [0, 1])
def test_two_processes_of_which_one_cannot_write(tmp_path, process):
    """Both end, and go on later as if nothing had been."""
    whole, settings = two_dense_processes(), {"checkpoint__timeout": 20, **DENSE_FSDP}
    command = [*dense_command(tmp_path / "run", **settings), "--processes=2", "--retry_seconds=1"]
    fault = Fault(tmp_path, "EIO", "w", "checkpoints/")
    for fails in (True, False):
        address = f"--coordinator=localhost:{free_port()}"
        variables = [fault.variables if fails and i == process else {} for i in range(2)]
        processes = [start([*command, address, f"--process={i}"], **variables[i]) for i in range(2)]
        statuses = [finish(process)[0] for process in processes]
        assert all(status != 0 for status in statuses) == fails, statuses
    assert same_end(tmp_path / "run", whole)

"""Faults and hangs of file operations, injected below Python into real processes."""

import errno
import re
import shutil
import subprocess

import pytest

from aoe_jax.conversion.exporting import export
from aoe_jax.errors import Hang, MachineFault
from tests import runs
from tests.processes import DENSE_FSDP, free_port, two_dense_processes
from tests.runs import STEPS, contents, dense_command, dense_run, last_line, same_end, start

pytestmark = pytest.mark.slow


@runs.shared
def faulty_disk():
    """Compiles the library that makes file operations fail, and returns its path."""
    library = runs.scratch("faulty") / "faulty_disk.so"
    source = runs.ROOT / "tests" / "faulty_disk.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


class Fault:
    """Makes some operations fail on paths that contain `part`, until `end` is called."""

    def __init__(self, tmp_path, code, operations, part):
        self._flag = tmp_path / "fails"
        number = -1 if code == "HANG" else getattr(errno, code)
        fault = f"{number}:{operations}:{part}:{self._flag}"
        self.variables = {"LD_PRELOAD": faulty_disk(), "FAULT": fault}
        self._flag.touch()

    def end(self):
        self._flag.unlink()

    def lasting(self, command, status=MachineFault.status):
        """Runs a command, which must end with this status; returns `(stdout, stderr)`."""
        process = start([*command, "--retry_seconds=1"], **self.variables)
        returned, stdout, stderr = runs.finish(process)
        assert returned == status and "Traceback" not in stderr, stderr
        return stdout, stderr

    def passing(self, command):
        """Runs a command, which must succeed; the fault ends when the second try has failed."""
        path = self._flag.with_name("stderr")
        with path.open("w") as stderr:
            process = start([*command, "--retry_seconds=60"], stderr=stderr, **self.variables)
            runs.wait_for(process, lambda: "next try in 1 s" in path.read_text())
            self.end()
            assert runs.finish(process)[0] == 0, path.read_text()


def stopped_run(folder):
    """Copies a run that has one step left; returns `(workdir, command that continues it)`."""
    return shutil.copytree(dense_run(), folder), dense_command(folder, train__steps=STEPS + 1)


STATE = f"checkpoints/{STEPS}/"
SHARD = "-00000.array_record"
READS = [  # (error, operations, part of the path)
    ("EIO", "o", "run/config.json"),
    ("ESTALE", "o", "run/heartbeat.json"),
    ("ENOTCONN", "or", STATE + "state"),
    ("EIO", "r", STATE + "state"),
    ("ECONNRESET", "o", STATE + "run"),
    ("ESTALE", "o", SHARD),
    ("EIO", "r", SHARD),
    ("ENOTCONN", "d", "run/checkpoints"),
    ("EIO", "o", "run/owner"),
]
WRITES = [
    ("ENOSPC", "w", "checkpoints/"),
    ("EROFS", "cm", "checkpoints/"),
    ("EIO", "w", "run/metrics.jsonl"),
]
NEEDLESS = [("EROFS", "c", "heartbeat.json"), ("EIO", "w", "tensorboard/")]


def ids(*cases):
    return {"argvalues": cases, "ids": [" ".join(case) for case in cases]}


@pytest.mark.parametrize("case", **ids(*READS))
def test_reads_that_fail(tmp_path, case):
    """A lasting fault ends the run and changes no file; the next run continues."""
    workdir, command = stopped_run(tmp_path / "run")
    fault, before = Fault(tmp_path, *case), contents(workdir)
    fault.lasting(command)
    assert contents(workdir) == before
    if case != READS[0] and case[2] != SHARD:  # files are unchanged: test one next run
        return
    fault.end()
    assert f"going on from step {STEPS}" in runs.succeed(command)
    assert not (workdir / "damaged_checkpoints").exists()


PASSING = [("or", STATE), ("r", SHARD), ("w", "checkpoints/"), ("m", "checkpoints/")]


@pytest.mark.parametrize("case", **ids(*PASSING))
def test_faults_that_pass(tmp_path, case):
    """A run survives temporary faults of checkpoints, the first batch and saves."""
    workdir, whole = tmp_path / "run", dense_run()  # makes the token store too
    if STATE in case:
        shutil.copytree(whole, workdir)
        (workdir / "summary.json").unlink()
    Fault(tmp_path, "EIO", *case).passing(dense_command(workdir))
    assert same_end(workdir, whole) and not (workdir / "damaged_checkpoints").exists()


@pytest.mark.parametrize("case", **ids(*WRITES))
def test_writes_that_fail(tmp_path, case):
    """A lasting fault ends the run. When the fault is over, the same command completes the run."""
    command, fault = dense_command(tmp_path / "run"), Fault(tmp_path, *case)
    assert "the same command goes on" in last_line(fault.lasting(command)[1])
    fault.end()
    runs.succeed(command)
    assert same_end(tmp_path / "run", dense_run())


@pytest.mark.parametrize("case", **ids(*NEEDLESS))
def test_files_that_a_run_can_do_without(tmp_path, case):
    _, stderr = Fault(tmp_path, *case).lasting(dense_command(tmp_path / "run"), status=0)
    assert "cannot be written" in stderr and "the run goes on" in stderr, stderr
    assert same_end(tmp_path / "run", dense_run())


def evaluation(folder):
    return ["eval.py", f"--workdir={stopped_run(folder / 'run')[0]}", "--split=validation"]


def evaluation_of_a_model(folder):
    folder.mkdir()
    export(dense_run(), folder / "model")
    return ["eval.py", f"--workdir={folder / 'model'}"]


def exporting(folder):
    workdir, _ = stopped_run(folder / "run")
    return ["-m", "aoe_jax.export", f"--workdir={workdir}", f"--output={folder / 'model'}"]


@pytest.mark.parametrize(
    ("command", "case"),
    [
        (evaluation, ("EIO", "o", STATE)),
        (evaluation, ("EIO", "r", SHARD)),
        (evaluation_of_a_model, ("EIO", "o", "model.safetensors")),
        (exporting, ("EDQUOT", "w", "model")),
    ],
)
def test_other_commands_that_fail(tmp_path, command, case):
    """Other commands change no file, and do not report a disk fault as damaged files."""
    command, fault = command(tmp_path / "files"), Fault(tmp_path, *case)
    before = contents(tmp_path / "files")
    assert "damaged" not in fault.lasting(command)[1]
    assert contents(tmp_path / "files") == before


def training_on_texts(folder):
    shutil.copytree(runs.corpus_folder(), folder / "texts")
    texts = {"data__name": "text", "data__path": folder / "texts", "train__steps": 1}
    return dense_command(folder / "run", **texts)


@pytest.mark.parametrize(
    ("command", "case"),
    [
        (evaluation, ("ESTALE", "s", "run/config.json")),
        (evaluation, ("ESTALE", "s", SHARD)),
        (training_on_texts, ("ENOTCONN", "s", "/texts")),
        (training_on_texts, ("ENOTCONN", "d", "/texts")),
    ],
)
def test_places_that_fail_for_a_while(tmp_path, command, case):
    """Paths on a disk that fails for a while are not treated as missing paths."""
    command = command(tmp_path)
    Fault(tmp_path, *case).passing(command)


def test_an_evaluation_that_cannot_be_written(tmp_path):
    """All results are printed, and a read-only disk counts as a mistake of the user."""
    workdir = shutil.copytree(runs.finished_run(), tmp_path / "run")
    fault = Fault(tmp_path, "EROFS", "c", "eval.json")
    stdout, stderr = fault.lasting(["eval.py", f"--workdir={workdir}"], status=2)
    assert "bits" in stdout and "layer" in stdout, stdout
    words = f"error: --workdir={workdir} cannot be written: Read-only file system"
    assert last_line(stderr) == words


def tokenising(folder):
    return dense_command(folder / "run", data__cache=folder / "cache"), "run/summary.json"


def preparing(folder):
    tokenizer, texts = dense_run() / "tokenizer.json", runs.corpus_folder()
    shares = ["--validation=0.3", "--test=0.3", f"--tokenizer={tokenizer}"]
    command = ["-m", "aoe_jax.prepare", f"--input={texts}/*.txt", f"--output={folder / 'store'}"]
    return [*command, *shares], "store/manifest.json"


@pytest.mark.parametrize(
    ("command", "case"),
    [
        (tokenising, ("ENOSPC", "w", "cache/tokens/")),
        (preparing, ("EDQUOT", "w", "store/")),
        (preparing, ("EIO", "w", "store/units")),
        (preparing, ("EIO", "r", "texts/")),
        (preparing, ("ENOTCONN", "s", "texts/")),
    ],
)
def test_texts_that_cannot_be_tokenised(tmp_path, command, case):
    """A lasting fault ends the command; a temporary fault does not."""
    (command, result), fault = command(tmp_path), Fault(tmp_path, *case)
    _, stderr = fault.lasting(command)
    is_run = result == "run/summary.json"
    words = "cannot be opened, or tokenised in data.cache=" if is_run else ""
    assert words in last_line(stderr) and not (tmp_path / result).exists()
    assert "it was tried for 1 s" in stderr  # also in the processes that prepare
    fault.passing(command)
    assert (tmp_path / result).exists()
    if is_run:
        assert same_end(tmp_path / "run", dense_run())
        stores = (tmp_path / "cache" / "tokens").iterdir()
        assert len([path for path in stores if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("operation", "file", "when"),
    [
        ("c", "run/owner.lease", "restoring"),
        ("r", STATE + "state", "restoring"),
        ("o", "/manifest.json", "restoring"),
        ("o", "model/config.json", "restoring"),
    ],
)
def test_a_disk_that_hangs(tmp_path, operation, file, when):
    """The disk hangs when the lease is acquired, a checkpoint is read, or prepared data or a model
    to train further is opened.
    """
    workdir, settings = tmp_path / "run", {"train__hang_timeout": 5}
    if "state" in file:
        shutil.copytree(dense_run(), workdir)
        (workdir / "summary.json").unlink()
    if "manifest" in file:
        settings |= {"data__name": "prepared", "data__path": str(runs.corpus_store())}
    if "model" in file:
        export(dense_run(), tmp_path / "model")
        settings["train__init_from"] = tmp_path / "model"
    fault = Fault(tmp_path, "HANG", operation, file)
    status, _, stderr = runs.finish(start(dense_command(workdir, **settings), **fault.variables))
    words = rf"error: process 0 \({when}\) made no progress for \d+ s \(train\.hang_timeout=5\); "
    assert re.fullmatch(f"{words}its stacks are in {workdir}/hang", last_line(stderr)), stderr
    assert status == Hang.status and (workdir / "hang" / "process_0.txt").exists()
    if "state" in file:
        fault.end()
        assert f"going on from step {STEPS}" in runs.succeed(dense_command(workdir))
        assert same_end(workdir, dense_run())


def on_two_processes(command, fault, process):
    """Runs two processes, of which `process` has the fault; returns `(statuses, stderr)`."""
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--retry_seconds=1"]
    processes = []
    for number in range(2):
        variables = fault.variables if number == process else {}
        processes.append(start([*command, *flags, f"--process={number}"], **variables))
    statuses, _, stderr = zip(*map(runs.finish, processes), strict=True)
    return statuses, stderr


@pytest.mark.parametrize(
    ("case", "process"),
    [(("EIO", "or", STATE + "state"), 1), (("ENOTCONN", "o", "run/config.json"), 0)],
)
def test_two_processes_of_which_one_cannot_begin(tmp_path, case, process):
    """Both processes end with the same status, and no file is changed."""
    workdir, command = stopped_run(tmp_path / "run")
    fault, before = Fault(tmp_path, *case), contents(workdir)
    statuses, stderr = on_two_processes(command, fault, process)
    assert statuses == (MachineFault.status,) * 2, stderr
    assert f"process {process} failed; see its log" in stderr[1 - process]
    assert contents(workdir) == before


def test_two_processes_of_which_one_cannot_write(tmp_path):
    """Both processes end; later the run continues and ends like an uninterrupted run."""
    whole, settings = two_dense_processes(), {"checkpoint__timeout": 20, **DENSE_FSDP}
    command = dense_command(tmp_path / "run", **settings)
    fault = Fault(tmp_path, "EIO", "w", "checkpoints/")
    statuses, stderr = on_two_processes(command, fault, 0)
    assert 0 not in statuses, stderr
    statuses, stderr = on_two_processes(command, fault, None)
    assert statuses == (0, 0), stderr
    assert same_end(tmp_path / "run", whole)


def test_two_processes_of_which_one_hangs(tmp_path):
    """One of two processes hangs without data, and the other waits for it in a collective."""
    two_dense_processes()
    command = dense_command(tmp_path / "run", train__hang_timeout=5, **DENSE_FSDP)
    fault = Fault(tmp_path, "HANG", "r", "/train" + SHARD)
    statuses, stderr = on_two_processes(command, fault, 1)
    # JAX may end one process as soon as the other has ended, before its report.
    ended = [number for number, status in enumerate(statuses) if status == Hang.status]
    assert ended, stderr
    assert all((tmp_path / "run" / "hang" / f"process_{number}.txt").exists() for number in ended)

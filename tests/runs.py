"""Tiny runs for the end-to-end tests: a folder of texts, settings, and command lines as a user
types them.
"""

import atexit
import fcntl
import functools
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from aoe_jax.config import Config, default_config
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.locking import exclusive
from aoe_jax.training.telemetry import MEASURED_KEYS
from tests.hasty import HASTY, xla_flags

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY, LOG_EVERY = 24, 3, 2
FOR_TPUS = {
    "aoe_jax.plan",
    "aoe_jax.compare",
    "aoe_jax.compare.plan",
    "benchmarks.tpu_compile",
}  # may compile for them

SETTINGS = {
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.d_model": 32,
    "model.vocab_size": 512,
    "model.max_len": 64,
    "model.dtype": "float32",
    "model.unroll": 1,
    "experts.n_experts": 4,
    "experts.top_k": 2,
    "experts.d_ffn": 32,
    "experts.d_low": 8,
    "balance.aux_weight": 0.0,
    "balance.aux_tokens": 1.0,
    "data.name": "text",
    "data.seq_len": 32,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.learning_rate": 3e-3,
    "train.final_learning_rate": 3e-4,
    "train.warmup_steps": 2,
    "train.log_every": LOG_EVERY,
    "train.eval_every": 10,
    "checkpoint.every": EVERY,
    "checkpoint.keep": 2,
}


@functools.cache
def _scratch():
    """One folder for all workers of pytest-xdist; the last one to end removes it."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if not session:
        return Path(tempfile.mkdtemp(prefix="aoe_jax_tests_")), None
    folder = Path(tempfile.gettempdir(), f"aoe_jax_tests_{session}")
    folder.mkdir(exist_ok=True)
    users = (folder / "users").open("w")
    fcntl.flock(users, fcntl.LOCK_SH)
    return folder, users


@atexit.register
def _remove_scratch():
    if _scratch.cache_info().currsize:
        folder, users = _scratch()
        try:
            if users:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another worker is still at it
        shutil.rmtree(folder, ignore_errors=True)


def shared(build):
    """Makes `build()` run once in a test session, whichever worker comes first; its value is
    pickled for the others.
    """

    @functools.cache
    @functools.wraps(build)
    def value():
        folder = scratch("shared")
        with exclusive(folder / f"{build.__name__}.lock"):
            file = folder / build.__name__
            if not file.exists():
                file.write_bytes(pickle.dumps(build()))
            return pickle.loads(file.read_bytes())

    return value


def scratch(name):
    """A folder that lasts as long as the test session."""
    folder = _scratch()[0] / name
    folder.mkdir(exist_ok=True)
    return folder


def write_texts(folder, count=40, seed=0):
    """Documents of three to six hundred words, so shorter and longer than a sequence."""
    words = [
        "the",
        "of",
        "state",
        "union",
        "war",
        "peace",
        "congress",
        "law",
        "great",
        "people",
        "army",
        "year",
    ]
    choice = random.Random(seed)
    for i in range(count):
        length = choice.choice([3, 20, 100, 600])
        (folder / f"{i:02d}.txt").write_text(" ".join(choice.choice(words) for _ in range(length)))
    return folder


@shared
def corpus_folder():
    """The folder of texts that all runs share."""
    return write_texts(scratch("texts"))


def settings(**changes):
    """`SETTINGS` with the corpus and with changes, `group__field=value`."""
    shared = {"data.path": str(corpus_folder()), "data.cache": str(scratch("cache"))}
    return SETTINGS | shared | {name.replace("__", "."): value for name, value in changes.items()}


def tiny_config(**changes):
    """The same as a `Config`."""
    config = default_config()
    config.update_from_flattened_dict(settings(**changes))
    return Config.from_config_dict(config)


def train_command(workdir, **changes):
    """The command line that trains with these settings."""
    overrides = [
        f"--config.{name}={value}"
        for name, value in settings(**changes).items()
        if value is not None
    ]
    return ["train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *overrides]


def start(command, **variables):
    """Starts a command line in the root of the repository, with environment variables of its own."""
    environment = (
        os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": HASTY if FOR_TPUS & {*command} else xla_flags(),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
            "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",  # else a benchmark would start twice, for its own
            **variables,
        }
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finish(process):
    """`(exit status, stdout, stderr)`."""
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def run(command):
    """Runs a command line: `(exit status, stdout, stderr)`."""
    return finish(start(command))


@shared
def mixture():
    """Settings of a run over two corpora with both masks: a prepared store of the texts, and a
    folder of other texts.
    """
    other = write_texts(scratch("others"), count=20, seed=1)
    text = open_corpus(tiny_config().data, SETTINGS["model.vocab_size"])
    store = shutil.copytree(text.tokenizer.parent, scratch("stores") / "mine")
    masks = {"data__document_mask": True, "data__loss_mask": True}
    return {"data__name": f"prepared@{store}=0.75, text@{other}=0.25", "data__path": None, **masks}


@contextmanager
def disk(folder, size):
    """A disk of so many bytes, such as `4m`, in a new folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def damage(shard):
    """Inverts some bytes in the middle of a file."""
    content = bytearray(shard.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 100)
    content[middle] = bytes(255 - byte for byte in content[middle])
    shard.write_bytes(content)


KINDS = {
    "aoe, gate=all": {"experts__gate": "all", "balance__aux_weight": 0.01},
    "router": {"experts__kind": "router", "balance__aux_weight": 0.01},
    "capacity": {
        "experts__kind": "capacity",
        "experts__capacity_factor": 1.0,
        "balance__aux_weight": 0.01,
    },
    "dense": {"experts__kind": "dense"},
    "top_p": {"experts__selection": "top_p", "balance__entropy_weight": 1e-4},
    "expert_choice": {"experts__selection": "expert_choice"},
}
_SHORT = {
    "train__steps": 6,
    "train__eval_every": 0,
    "train__learning_rate": 1e-2,
    "checkpoint__every": 100,
}


def kind_config(kind):
    """The configuration of a run of `kind_runs`."""
    return tiny_config(**_SHORT, **KINDS[kind])


@shared
def kind_runs():
    """Short runs of `KINDS`, two at a time: `{kind: (workdir, stderr)}`."""
    corpus_folder()

    def train_kind(kind):
        workdir = scratch("kinds") / kind
        status, _, stderr = run(train_command(workdir, **_SHORT, **KINDS[kind]))
        assert status == 0, stderr
        return workdir, stderr

    with ThreadPool(2) as pool:
        return dict(zip(KINDS, pool.map(train_kind, KINDS, chunksize=1), strict=True))


@shared
def finished_runs():
    """Workdirs of two uninterrupted runs, `{train.accumulate: workdir}`; copy one before changing
    it.
    """
    workdirs = {accumulate: scratch("runs") / f"accumulate_{accumulate}" for accumulate in (1, 2)}
    processes = [
        start(train_command(workdir, train__accumulate=n)) for n, workdir in workdirs.items()
    ]
    for process in processes:
        status, _, stderr = finish(process)
        assert status == 0, stderr
    return workdirs


def finished_run():
    """Workdir of the uninterrupted run without accumulation."""
    return finished_runs()[1]


def read_metrics(workdir):
    """The lines of `metrics.jsonl`: `(training lines, validation lines)`."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [
        line for line in lines if "validation_nll" in line
    ]


def untimed(workdir):
    """The lines of `metrics.jsonl` without what differs between two equal runs: `(training lines,
    validation lines)`.
    """
    return tuple(
        [
            {name: value for name, value in line.items() if name not in MEASURED_KEYS}
            for line in lines
        ]
        for lines in read_metrics(workdir)
    )


def same_end(workdir, whole):
    """Whether two runs ended alike, bit for bit, and reported alike on their way."""
    summaries = [
        json.loads((path / "summary.json").read_text())["metrics"] for path in (workdir, whole)
    ]
    return summaries[0] == summaries[1] and untimed(workdir) == untimed(whole)


def read_events(workdir):
    """The values of the TensorBoard files: `{(tag, step): value}`, as TensorBoard's own messages."""
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            found |= {(value.tag, event.step): value for value in event.summary.value}
    return found


def contents(folder):
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def truncate_state(workdir):
    """Leaves one byte of every file that holds arrays of the newest checkpoint, so that none of
    them can be read.

    How Orbax spreads the arrays over files differs from run to run: a part of the files may hold
      optimizer state alone.
    """
    newest = max((workdir / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    paths = [path for path in (newest / "state").rglob("d/*") if path.is_file()]
    assert paths
    for path in paths:
        os.truncate(path, 1)

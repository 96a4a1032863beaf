"""Tiny runs for the end-to-end tests: a folder of texts, settings, command lines of users, and
functions that read the files of runs.
"""

import dataclasses
import functools
import json
import os
import pickle
import random
import signal
import struct
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto.event_pb2 import Event, SessionLog

from aoe_jax.config.data import DataConfig
from aoe_jax.config.training import CheckpointConfig, TrainConfig
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.storage.files import exclusive
from aoe_jax.training.metrics import MEASURED
from tests import forking
from tests.hasty import HASTY, xla_flags
from tests.settings import config_of

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY, LOG_EVERY = 24, 3, 2
WORDS = "the of state union war peace congress law great people army year"
FOR_TPUS = {"aoe_jax.plan", "benchmarks.attention", "benchmarks.grouped_compile"}  # for TPUs

_GROUPS = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "vocab_size": 512, "max_len": 64}
    | {"dtype": "float32", "unroll": 1},
    "experts": {"n_experts": 4, "top_k": 2, "d_ffn": 32, "d_low": 8},
    "balance": {"aux_weight": 0.0, "aux_tokens": 1.0},
    "data": {"name": "text", "seq_len": 32},
    "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 3e-3, "warmup": 2 / STEPS}
    | {"final_learning_rate": 3e-4, "log_every": LOG_EVERY, "eval_every": 10},
    "checkpoint": {"every": EVERY, "keep": 2},
}
SETTINGS = {f"{group}.{name}": v for group, values in _GROUPS.items() for name, v in values.items()}

# Halves the time of a run, for tests that do not depend on the model.
DENSE = {"model__n_layers": 1, "experts__kind": "dense"}


def shared(build):
    """Makes `build(*arguments)` run once in a test session, in whichever worker needs it first.

    Other workers wait for it and read its pickled value.
    """

    @functools.cache
    @functools.wraps(build)
    def value(*arguments):
        name = "_".join([build.__module__, build.__name__, *map(str, arguments)])
        file = scratch("shared") / name
        with exclusive(scratch("shared") / f"{name}.lock"):
            if not file.exists():
                file.write_bytes(pickle.dumps(build(*arguments)))
            return pickle.loads(file.read_bytes())

    return value


def scratch(name):
    """Returns a folder that all workers share; it is deleted after the test session."""
    folder = Path(os.environ["AOE_JAX_SCRATCH"]) / name
    folder.mkdir(exist_ok=True)
    return folder


def write_texts(folder, count=40, seed=0):
    """Writes documents of 3 to 600 words: some are shorter and some longer than a sequence."""
    choice, words = random.Random(seed), WORDS.split()
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
    """Returns the `Config` of `settings`."""
    return config_of(settings(**changes))


def train_command(workdir, **changes):
    """The command line that trains with these settings."""
    given = {name: value for name, value in settings(**changes).items() if value is not None}
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    return ["train.py", "--config=configs/tiny.py:published", f"--workdir={workdir}", *flags]


def dense_command(workdir, **changes):
    """`train_command` of `DENSE`, with changes."""
    return train_command(workdir, **DENSE | changes)


# A save lasts longer than the steps after it.
SLOW_SAVES = """
import os, time
def slowly(move):
    def moved(source, *arguments, **options):
        if "orbax-checkpoint-tmp" in os.fspath(source):
            time.sleep({seconds})
        return move(source, *arguments, **options)
    return moved
os.rename, os.replace = slowly(os.rename), slowly(os.replace)
"""


def patched(code, workdir, **changes):
    """`dense_command` whose program is changed by `code` before it runs."""
    program = f"import train\nfrom aoe_jax import cli\n{code}\ncli.run(train.main)"
    return ["-c", program, *dense_command(workdir, **changes)[1:]]


def fine_tuned(directory, workdir, **changes):
    """Returns a command line that trains a model further."""
    data = tiny_config().data
    overrides = {f"data.{name}": getattr(data, name) for name in ("name", "path", "cache")}
    overrides |= {"data.seq_len": 32, "train.steps": 4, "train.warmup": 0.0, "train.log_every": 1}
    overrides |= {"train.batch_size": 4, **changes}
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return ["-m", "aoe_jax.finetune", f"--model={directory}", f"--workdir={workdir}", *flags]


def start(command, **options):
    """`forking.start` on one virtual CPU device, unless `options` have other `XLA_FLAGS`."""
    flags = HASTY if FOR_TPUS & {*command} else xla_flags()
    return forking.start(command, **{"XLA_FLAGS": flags} | options)


def finish(process):
    """`(exit status, stdout, stderr)`."""
    stdout, stderr = process.communicate(timeout=900)
    return process.returncode, stdout, stderr


def run(command):
    """Runs a command line: `(exit status, stdout, stderr)`."""
    return finish(start(command))


def succeed(command):
    """Runs a command line that must end with status 0, and returns its stderr."""
    status, _, stderr = run(command)
    assert status == 0, stderr
    return stderr


def wait_for(process, condition):
    """Waits until `condition()` is true; fails if the process, which may be None, ends before."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_when(process, condition):
    """Kills a process at a random moment soon after `condition()` is true."""
    wait_for(process, condition)
    time.sleep(random.uniform(0, 0.02))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


def last_line(stderr):
    """Returns the last line of a command's stderr, which says why it ended."""
    return stderr.strip().splitlines()[-1]


def heartbeat(workdir):
    """Returns the content of `heartbeat.json`; if it does not exist yet, its fields are None."""
    path = workdir / "heartbeat.json"
    return json.loads(path.read_text()) if path.exists() else {"status": None, "step": None}


def saved(workdir, step):
    """Whether there is a checkpoint of this or a later step; older ones are deleted."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return any(name.isdecimal() and int(name) >= step for name in names)


def corpus_store():
    """The token store of the texts."""
    return open_corpus(tiny_config().data, SETTINGS["model.vocab_size"]).tokenizer.parent


def as_read_from(directory, config):
    """Returns the configuration that is read from a model that was exported with `config`: its only
    path is its own tokenizer, and its only setting of training is the batch size.
    """
    own = {"cache": DataConfig.cache, "tokenizer": str(directory / "tokenizer.json")}
    data = dataclasses.replace(config.data, **own)
    train = TrainConfig(batch_size=config.train.batch_size)
    return dataclasses.replace(config, data=data, train=train, checkpoint=CheckpointConfig())


def damage(shard):
    """Inverts some bytes in the middle of a file."""
    content = bytearray(shard.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 100)
    content[middle] = bytes(255 - byte for byte in content[middle])
    shard.write_bytes(content)


KINDS = {
    "aoe, over all": {"routing__norm_topk_prob": False, "balance__aux_weight": 0.01},
    "router": {"experts__kind": "router", "balance__aux_weight": 0.01},
    "capacity": {"experts__kind": "capacity", "routing__capacity_factor": 1.0}
    | {"balance__aux_weight": 0.01},
    "dense": {"experts__kind": "dense"},
    "expert_choice": {"routing__name": "expert_choice"},
}
_SHORT = {"train__steps": 6, "train__warmup": 0.3, "train__eval_every": 0}
_SHORT |= {"train__learning_rate": 1e-2, "checkpoint__every": 100}


def kind_config(kind, **changes):
    """The configuration of a `kind_run`, with changes."""
    return tiny_config(**_SHORT, **KINDS[kind], **changes)


@shared
def kind_run(kind):
    """A short run of one of `KINDS`: `(workdir, stderr)`."""
    workdir = scratch("kinds") / kind
    return workdir, succeed(train_command(workdir, **_SHORT, **KINDS[kind]))


@shared
def whole_run(accumulate):
    """Workdir of an uninterrupted run, in a process of its own; copy it before changing it."""
    workdir = scratch("runs") / f"accumulate_{accumulate}"
    process = start(train_command(workdir, train__accumulate=accumulate), forked=False)
    status, _, stderr = finish(process)
    assert status == 0, stderr
    return workdir


def finished_run():
    """`whole_run` without accumulation."""
    return whole_run(1)


@shared
def dense_run():
    """Workdir of an uninterrupted run of `dense_command`."""
    workdir = scratch("runs") / "dense"
    succeed(dense_command(workdir))
    return workdir


def read_metrics(workdir):
    """The lines of `metrics.jsonl`: `(training lines, validation lines)`."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    return training, [line for line in lines if "validation_nll" in line]


def losses(workdir):
    """The logged losses of a run."""
    return [line["loss"] for line in read_metrics(workdir)[0]]


def computed(line):
    """Returns a line of `metrics.jsonl` without measured times, which differ in every run."""
    return {name: value for name, value in line.items() if not name.endswith(MEASURED)}


def untimed(workdir):
    """`read_metrics` of `computed` lines."""
    return tuple([computed(line) for line in lines] for lines in read_metrics(workdir))


def same_end(workdir, whole):
    """Whether the final and all other metrics of two runs are bit-identical, except for times."""
    texts = [(path / "summary.json").read_text() for path in (workdir, whole)]
    one, other = (json.loads(text)["metrics"] for text in texts)
    return one == other and untimed(workdir) == untimed(whole)


def raw_checkpoint(workdir, step):
    """Reads a checkpoint without code of `aoe_jax`. Returns every array by its path, and the data
    that is saved beside the arrays.
    """
    folder = workdir / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        state = checkpointer.restore(folder / "state", args=args)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path): array for path, array in leaves}
    return arrays, json.loads((folder / "run" / "metadata").read_text())


def read_events(workdir):
    """Reads the values of the TensorBoard files as `{(tag, step): value}`. A value is a message of
    TensorBoard's protocol. As in TensorBoard, a START event hides earlier values from its step on.
    """
    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            if event.session_log.status == SessionLog.START:
                found = {place: value for place, value in found.items() if place[1] < event.step}
            found |= {(value.tag, event.step): value for value in event.summary.value}
    return found


def contents(folder):
    """Returns the bytes of every file below a folder by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def truncate_state(workdir):
    """Cuts every file with arrays of the newest checkpoint to one byte. It cuts all files, because
    Orbax distributes arrays over files differently in each run.
    """
    newest = max((workdir / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    paths = [path for path in (newest / "state").rglob("d/*") if path.is_file()]
    assert paths
    for path in paths:
        os.truncate(path, 1)

"""A user's mistake ends with exit status 2 and one or two lines that name it; no file is
touched.
"""

import json
import shutil
from dataclasses import dataclass, field

import pytest

from tests.in_process import execute
from tests.runs import (
    STEPS,
    contents,
    finish,
    finished_run,
    start,
    train_command,
    truncate_state,
    write_texts,
)

CONFIG = "--config=configs/tiny.py"


@dataclass
class Mistake:
    """A command line and words of its message. `{workdir}` and `{here}` are two new folders."""

    command: list
    words: list
    prepare: callable = lambda workdir, here: None
    changes: dict = field(default_factory=dict)  # changes of the settings of `tests.runs`


def flags(*arguments):
    return ["train.py", "--workdir={workdir}", *arguments]


def with_file(name, text):
    return lambda workdir, here: (here / name).write_text(text)


# (arguments of train.py, words of the message, ...).
GIVEN = [
    ("--config.routing.name=top_p --config.routing.q=1", "routing.q is unknown", "known are p"),
    ("--config.model.n_kv_heads=half", "must be of type int or None"),
    ("--config.model.n_kv_heads={{[]:1}}", "must be of type int or None"),
    ("--config.train.stepz=3", "train.stepz is unknown", "batch_size", "; did you mean steps?"),
    ("--config.routing.name=sparsemixer", "name='sparsemixer': can be used but not trained"),
    ("--config.routing.name=top_p --config.routing.p=high", "routing.p='high'", "of type float"),
    ("--config.nonsense.x=1", "config.nonsense", "unknown", "model, experts"),
    ("--config.train.steps", "--config.train.steps", "Missing value"),
    ("--foo", "--foo is no flag"),
    ("--start-ower", "--start-ower is no flag", "did you mean --start-over?"),
    ("extra", "'extra'", "--name=value"),
    ("--config.mesh.expert=2", "config.mesh", "product must be the number of devices, 1 "),
    ("--processes=0", "--processes=0", "0 is not a positive integer"),
    ("--retry_seconds=-5", "-5.0 is not a number in the range [0, 1000000]"),
    ("--retry_seconds=nan", "--retry_seconds=nan", "must be finite"),
    ("--config.model.d_model=4294967296", "config.model.d_model=4294967296", "2**31"),
    ("--wandb=\udcff", "--wandb=", "must be UTF-8"),
    ("--distributed", "no cluster", "--coordinator"),
    ("--coordinator=localhost:1", "--processes is missing", "--process together"),
    ("--coordinator=localhost:1 --processes=2 --process=2", "--process=2", "--processes=2"),
    ("--coordinator=here --processes=2 --process=0", "--coordinator=here", "HOST:PORT"),
    ("--coordinator=localhost:99999 --processes=2 --process=0", "with a port below 65536"),
]
FILES = [  # (content of a configuration file, words of the message)
    ("x = 1\nx = (\n", "SyntaxError", "line 2"),
    ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError", "line 2"),
    ("import sys\ndef get_config():\n    sys.exit('no corpus')\n", "called sys.exit('no corpus')"),
    ("def get_config():\n    pass\n", "ConfigDict"),
]
WRONG_FILE = "--config={here}/wrong.py"
COMMAND_LINE = (
    {given: Mistake(flags(CONFIG, *given.split()), words) for given, *words in GIVEN}
    | {
        text: Mistake(flags(WRONG_FILE), ["{here}/wrong.py", *words], with_file("wrong.py", text))
        for text, *words in FILES
    }
    | {
        "variant of tiny.py": Mistake(flags(f"{CONFIG}:nope"), ["tiny.py:nope", "aoe, published"]),
        "no config": Mistake(flags(), ["--config is missing", "aoe_jax:tiny"]),
        "no workdir": Mistake(["train.py", CONFIG], ["--workdir is missing"]),
        "router of a kind without one": Mistake(
            flags("--config=configs/methods.py:smear", "--config.routing.name=top_k"),
            ["config.routing.name='top_k'", "experts.kind='smear' has no router"],
        ),
        "router's field without a configuration": Mistake(
            ["eval.py", "--workdir={workdir}", "--config.routing.p=0.5"], ["--config is missing"]
        ),
        "own method with a mistake": Mistake(
            flags(CONFIG, "--config.routing.name={here}/close.py:Close"),
            ["config.routing.name=", "No module named 'numpyy' (line 2 of"],
            with_file("close.py", "x = 1\nimport numpyy\n"),
        ),
        "no config file, but an override": Mistake(
            flags("--config={here}/nope.py", "--config.routing.p=0.5"), ["nope.py", "no such file"]
        ),
        "seed out of range": Mistake(
            ["-m", "aoe_jax.generate", "--workdir={workdir}", "--seed=99999999999999999999"],
            ["--seed=99999999999999999999", "smaller than 2**31"],
        ),
        "unknown topology": Mistake(
            ["-m", "aoe_jax.plan", CONFIG, "--topology=v9:2x2"],
            ["--topology=v9:2x2", "v4, v5e, v5p, v6e, tpu7x, a100, l4, h100, b200"],
        ),
        "no compiler for GPUs": Mistake(
            ["-m", "aoe_jax.plan", CONFIG, "--topology=h100:8"],
            ["--topology=h100:8", "pip install 'jax[cuda13]'"],
        ),
        "unknown backend of a benchmark": Mistake(
            ["-m", "benchmarks.grouped_compile", "--backends=mosaic"],
            ["--backends=mosaic: choose one of blocked, ", "did you mean mosaic_gpu?"],
        ),
    }
)


def finished(workdir, here):
    shutil.copytree(finished_run(), workdir)


def finished_and_truncated(workdir, here):
    """Leaves only the truncated checkpoint, because training continues from any other one."""
    finished(workdir, here)
    truncate_state(workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name != str(STEPS):
            shutil.rmtree(path)


def finished_and_changed_texts(workdir, here):
    finished(workdir, here)
    (here / "texts").mkdir()
    write_texts(here / "texts", seed=1)


def finished_elsewhere(workdir, here):
    """A run whose configuration names a folder of texts that has changed since."""
    finished_and_changed_texts(workdir, here)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["path"] = str(here / "texts")
    (workdir / "config.json").write_text(json.dumps(config))


TEXTS = {"data__path": "{here}/texts", "data__cache": "{here}/cache"}
TRAIN, EVAL = "train", ["eval.py", "--workdir={workdir}"]
RUNS = {
    "unknown data set": Mistake(
        TRAIN, ["data.name='lm1bb'", "lm1b"], changes={"data__name": "lm1bb"}
    ),
    "no token store": Mistake(
        TRAIN,
        ["token store '{here}': manifest.json is missing", "python -m aoe_jax.prepare"],
        changes={"data__name": "prepared", "data__path": "{here}"},
    ),
    "length of a sequence": Mistake(
        TRAIN,
        ["config.data.seq_len=99999"],
        changes={"data__seq_len": 99999, "model__max_len": 99999},
    ),
    "steps reached": Mistake(TRAIN, [f"train.steps={STEPS}", f"already at step {STEPS}"], finished),
    "profile beyond the run": Mistake(
        [*flags(CONFIG), f"--profile={STEPS + 2}:9"],
        [f"--profile={STEPS + 2}:9", f"the run ends at step {STEPS + 3}"],
        finished,
        {"train__steps": STEPS + 3},
    ),
    "no project": Mistake(
        [*flags(CONFIG), "--wandb="],
        ["--wandb=", "name a project"],
        finished,
        {"train__steps": STEPS + 3},
    ),
    "another configuration": Mistake(
        TRAIN,
        [
            "another configuration",
            "experts.d_low is 8 there, 16 here",
            "train.seed is 0 there, 1 here",
        ],
        finished,
        {"experts__d_low": 16, "train__seed": 1, "train__steps": 99},
    ),
    "changed texts": Mistake(
        TRAIN,
        ["token store", "data.path"],
        finished_and_changed_texts,
        TEXTS | {"train__steps": STEPS + 1},
    ),
    "the only checkpoint is truncated": Mistake(
        TRAIN,
        [f"{{workdir}}/checkpoints/{STEPS}", "is damaged", "there is no other"],
        finished_and_truncated,
        {"train__steps": STEPS + 1},
    ),
    "workdir is a file": Mistake(
        TRAIN, ["--workdir={workdir}", "file"], lambda workdir, here: workdir.write_text("mine")
    ),
    "workdir with a long name": Mistake(
        ["train.py", CONFIG, f"--workdir={{here}}/{'x' * 300}"],
        ["--workdir={here}/xxx", "File name too long"],
    ),
    "workdir lies in a file": Mistake(
        ["train.py", CONFIG, "--workdir={here}/file/run"],
        ["--workdir={here}/file/run", "cannot be written"],
        with_file("file", "mine"),
        {"train__steps": 6},
    ),
    "eval: no workdir": Mistake(
        EVAL, ["{workdir}/config.json cannot be read", "a training run or of a model"]
    ),
    "eval: changed texts": Mistake(EVAL, ["token store", "data.path"], finished_elsewhere),
}
MISTAKES = COMMAND_LINE | RUNS


AS_A_USER = {"--distributed", "unknown data set"}  # these run in a new process


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, tmp_path, one_device):
    mistake, workdir = MISTAKES[name], tmp_path / "run"
    mistake.prepare(workdir, tmp_path)
    before, folders = contents(tmp_path), {"here": tmp_path, "workdir": workdir}
    changes = {
        field: value.format(**folders) if isinstance(value, str) else value
        for field, value in mistake.changes.items()
    }
    command = mistake.command
    if command == TRAIN:
        command = train_command(workdir, **changes)
    elif changes:
        command = [*command, *train_command(tmp_path, **changes)[3:]]
    command = [word.format(**folders) for word in command]
    if name in AS_A_USER:
        status, stdout, stderr = finish(start(command, forked=False))
    else:
        status, stdout, stderr = execute(command)
    assert (status, stdout) == (2, ""), stderr
    progress, error, message = stderr.rpartition("error: ")
    assert error and len(message.splitlines()) <= 2
    # A run logs its progress until it finds the mistake; a wrong command line logs nothing.
    assert all(line[:2].isdigit() and line[2] == ":" for line in progress.splitlines())
    assert progress == "" or name in RUNS
    for word in mistake.words:
        assert word.format(**folders) in message
    after = contents(tmp_path)
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    assert not [path for path in changed if not path.startswith("cache/")]
    assert not workdir.exists() or mistake.prepare is not Mistake.prepare

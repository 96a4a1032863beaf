"""A user's mistake: exit status 2, a line or two that name what is wrong, no traceback, and nothing
touched.
"""

import json
import shutil
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.run import evaluate_workdir
from aoe_jax.training.loop import train
from configs import paper, tiny
from tests.runs import (
    STEPS,
    contents,
    finished_run,
    run,
    scratch,
    settings,
    shared,
    tiny_config,
    train_command,
    truncate_state,
    write_texts,
)

CONFIG = "--config=configs/tiny.py"


@dataclass
class Mistake:
    """A command line and words of its message; `{workdir}` and `{here}` stand for folders of its
    own.
    """

    command: list
    words: list
    prepare: callable = lambda workdir, here: None
    changes: dict = field(default_factory=dict)  # of a training with the settings of `tests.runs`


def flags(*arguments):
    return ["train.py", "--workdir={workdir}", *arguments]


def wrong_config(*overrides, config=CONFIG):
    return flags(config, *(f"--config.{override}" for override in overrides))


def with_file(name, text):
    return lambda workdir, here: (here / name).write_text(text)


COMMAND_LINE = {
    "top_k": Mistake(wrong_config("experts.top_k=9"), ["config.experts.top_k=9", "n_experts=8"]),
    "variant of tiny.py": Mistake(flags(f"{CONFIG}:nope"), ["tiny.py:nope", "aoe, moe, dense"]),
    "no config": Mistake(flags(), ["--config is missing", "configs/tiny.py"]),
    "no workdir": Mistake(["train.py", CONFIG], ["--workdir is missing"]),
    "mistyped field": Mistake(
        wrong_config("train.stepz=3"), ["config.train.stepz", "unknown", "steps, batch_size"]
    ),
    "mistyped group": Mistake(
        wrong_config("nonsense.x=1"), ["config.nonsense", "unknown", "model, experts"]
    ),
    "weights of trained models": Mistake(
        wrong_config("experts.kind=router", "experts.gate=sparsemixer"),
        ["config.experts.gate='sparsemixer'", "'chosen'"],
    ),
    "word for a number": Mistake(
        wrong_config("train.steps=abc"), ["--config.train.steps=abc", "whole number"]
    ),
    "word for a switch": Mistake(
        wrong_config("model.tie_embeddings=maybe"),
        ["--config.model.tie_embeddings=maybe", "true or false"],
    ),
    "weight that is no number": Mistake(
        wrong_config("data.name=sotu=0.9, text@/a=much"),
        ["config.data.name='sotu=0.9, text@/a=much'", "the weight 'much' of text@/a is no number"],
    ),
    "several corpora and one path": Mistake(
        wrong_config("data.name=sotu, lm1b", "data.path=/a"), ["config.data.path='/a'", "NAME@PATH"]
    ),
    "no value": Mistake(wrong_config("train.steps"), ["--config.train.steps", "Missing value"]),
    "unknown flag": Mistake(flags(CONFIG, "--foo"), ["--foo is no flag"]),
    "stray word": Mistake(flags(CONFIG, "extra"), ["'extra'", "--name=value"]),
    "mesh of other devices": Mistake(
        wrong_config("mesh.expert=2"),
        ["config.mesh", "expert=2", "make up 1 devices", "number of devices"],
    ),
    "mesh that doesn't divide": Mistake(
        wrong_config("mesh.expert=3"), ["config.mesh.expert=3", "must divide experts.n_experts=8"]
    ),
    "too few processes": Mistake(
        flags(CONFIG, "--processes=0"), ["--processes=0", "whole number, 1 or greater"]
    ),
    "profile of no steps": Mistake(flags(CONFIG, "--profile=x"), ["--profile=x", "STEP:N", "20:3"]),
    "no cluster": Mistake(
        flags(CONFIG, "--distributed"), ["--distributed", "no cluster", "--coordinator"]
    ),
    "half of a process": Mistake(
        flags(CONFIG, "--coordinator=localhost:1"), ["--processes is missing", "go together"]
    ),
    "process out of range": Mistake(
        flags(CONFIG, "--coordinator=localhost:1", "--processes=2", "--process=2"),
        ["--process=2", "--processes=2"],
    ),
    "coordinator without a port": Mistake(
        flags(CONFIG, "--coordinator=here", "--processes=2", "--process=0"),
        ["--coordinator=here", "HOST:PORT"],
    ),
    "unknown topology": Mistake(
        ["-m", "aoe_jax.plan", CONFIG, "--topology=v9:2x2"],
        ["--topology=v9:2x2", "v4, v5e, v5p, v6e, tpu7x, h100"],
    ),
    "no compiler for GPUs": Mistake(
        ["-m", "aoe_jax.plan", CONFIG, "--topology=h100:8"],
        ["--topology=h100:8", "pip install 'jax[cuda13]'"],
    ),
    "no config file, but an override": Mistake(
        wrong_config("train.steps=3", config="--config={here}/nope.py"), ["nope.py", "no such file"]
    ),
    "config file with a syntax error": Mistake(
        flags("--config={here}/broken.py"),
        ["broken.py", "SyntaxError", "line 2"],
        with_file("broken.py", "x = 1\nx = (\n"),
    ),
    "config file that fails": Mistake(
        flags("--config={here}/fails.py"),
        ["{here}/fails.py", "ZeroDivisionError", "line 2"],
        with_file("fails.py", "def get_config():\n    return 1 / 0\n"),
    ),
    "config file that returns nothing": Mistake(
        flags("--config={here}/nothing.py"),
        ["nothing.py", "ConfigDict"],
        with_file("nothing.py", "def get_config():\n    pass\n"),
    ),
}


def finished(workdir, here):
    shutil.copytree(finished_run(), workdir)


def finished_with(name, text):
    def prepare(workdir, here):
        finished(workdir, here)
        (workdir / name).write_text(text)

    return prepare


def finished_and_truncated(workdir, here):
    finished(workdir, here)
    truncate_state(workdir)


def finished_and_truncated_alone(workdir, here):
    """Where there is another one, training goes on from that."""
    finished_and_truncated(workdir, here)
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


def empty_texts(workdir, here):
    (here / "texts").mkdir()


def latin_1_texts(workdir, here):
    (here / "texts").mkdir()
    for name in "abc":
        (here / "texts" / f"{name}.txt").write_bytes(b"caf\xe9")


TEXTS = {"data__path": "{here}/texts", "data__cache": "{here}/cache"}
TRAIN, EVAL = "train", ["eval.py", "--workdir={workdir}"]
RUNS = {
    "unknown data set": Mistake(
        TRAIN, ["data.name='lm1bb'", "lm1b"], changes={"data__name": "lm1bb"}
    ),
    "no token store": Mistake(
        TRAIN,
        ["'prepared' names {here}, which is no token store", "python -m aoe_jax.data.prepare"],
        changes={"data__name": "prepared", "data__path": "{here}"},
    ),
    "no such corpus in a mixture": Mistake(
        TRAIN,
        ["data.name='lm1bb'", "lm1b"],
        empty_texts,
        {"data__name": "lm1bb, sotu", "data__path": None},
    ),
    "empty folder of texts": Mistake(
        TRAIN, ["data.path='{here}/texts'", "no .txt file"], empty_texts, TEXTS
    ),
    "text that isn't UTF-8": Mistake(
        TRAIN, ["data.path='{here}/texts'", ".txt is not UTF-8"], latin_1_texts, TEXTS
    ),
    "steps reached": Mistake(TRAIN, [f"train.steps={STEPS}", f"already at step {STEPS}"], finished),
    "profile beyond the run": Mistake(
        [*flags(CONFIG), f"--profile={STEPS + 2}:9"],
        [f"--profile={STEPS + 2}:9", f"the steps {STEPS + 1} to {STEPS + 3}"],
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
        [f"{{workdir}}/checkpoints/{STEPS}", "can't be read", "there is no other"],
        finished_and_truncated_alone,
        {"train__steps": STEPS + 1},
    ),
    "config.json isn't JSON": Mistake(
        TRAIN,
        ["{workdir}/config.json", "can't be read"],
        finished_with("config.json", "{"),
        {"train__steps": STEPS + 1},
    ),
    "workdir is a file": Mistake(
        TRAIN, ["--workdir={workdir}", "file"], lambda workdir, here: workdir.write_text("mine")
    ),
    "workdir lies in a file": Mistake(
        ["train.py", CONFIG, "--workdir={here}/file/run"],
        ["--workdir={here}/file/run", "can't be written"],
        with_file("file", "mine"),
        {"train__steps": 6},
    ),
    "eval: no workdir": Mistake(EVAL, ["{workdir}/config.json", "can't be read"]),
    "eval: no checkpoint": Mistake(
        EVAL,
        ["{workdir}", "no complete checkpoint"],
        lambda workdir, here: shutil.copytree(
            finished_run(), workdir, ignore=shutil.ignore_patterns("checkpoints")
        ),
    ),
    "eval: truncated checkpoint": Mistake(
        EVAL, [f"{{workdir}}/checkpoints/{STEPS}", "can't be read"], finished_and_truncated
    ),
    "eval: changed texts": Mistake(EVAL, ["token store", "data.path"], finished_elsewhere),
    "eval: unknown split": Mistake(
        [*EVAL, "--split=train"], ["--split=train", "validation, test"], finished
    ),
}
MISTAKES = COMMAND_LINE | RUNS


# Those that are found only after JAX has started, which takes seconds, one after the other in one
# process.
TOGETHER = [name for name, mistake in RUNS.items() if mistake.command in (TRAIN, EVAL)]
for name in ("unknown data set", "steps reached", "eval: truncated checkpoint"):
    TOGETHER.remove(name)  # and some as the user meets them
IN_ONE_PROCESS = """
import json, sys
from pathlib import Path
from aoe_jax.config import Config
from aoe_jax.errors import UserError
from aoe_jax.evaluation.run import evaluate_workdir
from aoe_jax.training.loop import train
from configs import tiny

for workdir, settings in json.loads(sys.argv[1]):
    message = None
    try:
        if settings is None:
            evaluate_workdir(Path(workdir))
        else:
            config = tiny.get_config()
            config.update_from_flattened_dict(settings)
            train(Config.from_config_dict(config), Path(workdir))
    except UserError as e:
        message = str(e)
    print(json.dumps(message))
"""


class Place:
    """The folder of a mistake, and what changes there."""

    def __init__(self, name):
        self.mistake, self.here = (
            MISTAKES[name],
            scratch("mistakes") / str(list(MISTAKES).index(name)),
        )
        self.here.mkdir()
        self.workdir = self.here / "run"
        self.mistake.prepare(self.workdir, self.here)
        self._before = contents(self.here)

    def filled_in(self, text):
        return text.format(here=self.here, workdir=self.workdir) if isinstance(text, str) else text

    def changes(self):
        return {name: self.filled_in(value) for name, value in self.mistake.changes.items()}

    def changed(self):
        after = {
            path: content
            for path, content in contents(self.here).items()
            if not path.startswith("cache/")
        }
        return sorted(
            p for p in self._before.keys() | after.keys() if self._before.get(p) != after.get(p)
        )


def as_a_command(name):
    """`(exit status, stdout, stderr, what changed in its folder, the folder)`."""
    place = Place(name)
    command, changes = place.mistake.command, place.changes()
    if command == TRAIN:
        command = train_command(place.workdir, **changes)
    elif changes:
        command = [*command, *train_command(place.here, **changes)[3:]]
    return *run(list(map(place.filled_in, command))), place.changed(), place.here


def together(names):
    """The same of each name, as if its message came of a command."""
    places = [Place(name) for name in names]
    cases = [
        (str(place.workdir), given(place.changes()) if place.mistake.command == TRAIN else None)
        for place in places
    ]
    status, stdout, stderr = run(["-c", IN_ONE_PROCESS, json.dumps(cases)])
    assert status == 0, stderr
    messages = map(json.loads, stdout.splitlines())
    return [
        (2, "", f"error: {m}", place.changed(), place.here)
        for m, place in zip(messages, places, strict=True)
    ]


def given(changes):
    return {name: value for name, value in settings(**changes).items() if value is not None}


@shared
def outcomes():
    """By name; a few at a time."""
    finished_run()
    alone = [name for name in MISTAKES if name not in TOGETHER]
    with ThreadPool(3) as pool:
        of_commands = pool.map_async(as_a_command, alone, chunksize=1)
        found = dict(zip(TOGETHER, together(TOGETHER), strict=True))
        return found | dict(zip(alone, of_commands.get(), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    status, stdout, stderr, changed, here = outcomes()[name]
    assert status == 2, stderr
    assert stdout == ""
    progress, error, message = stderr.rpartition("error: ")
    assert error and len(message.splitlines()) <= 2
    # A run logs what it does before it comes upon the mistake; a wrong command line says one thing
    # only.
    assert all(line[:2].isdigit() and line[2] == ":" for line in progress.splitlines())
    assert progress == "" or name in RUNS
    for word in MISTAKES[name].words:
        assert word.format(here=here, workdir=here / "run") in message
    assert "Traceback" not in stderr
    assert changed == []
    assert not (here / "run").exists() or MISTAKES[name].prepare is not Mistake.prepare


VALUES = {
    "config.experts.top_k=5": ({"experts__top_k": 5}, "n_experts=4"),
    "config.experts.d_low=32": ({"experts__d_low": 32}, "smaller than model.d_model=32"),
    "config.experts.d_low=0": ({"experts__d_low": 0}, "greater than 0"),
    "config.experts.selection='top_q'": (
        {"experts__selection": "top_q"},
        "top_k, ranked, top_p, expert_choice",
    ),
    "config.model.n_heads=3": ({"model__n_heads": 3}, "d_model=32"),
    "config.data.seq_len=65": ({"data__seq_len": 65}, "max_len=64"),
    "config.train.accumulate=3": ({"train__accumulate": 3}, "batch_size=4"),
    "config.train.warmup_steps=24": ({"train__warmup_steps": 24}, "train.steps=24"),
}


@pytest.mark.parametrize("start", VALUES)
def test_values_that_do_not_fit_the_run(start):
    changes, hint = VALUES[start]
    with pytest.raises(UserError) as error:
        tiny_config(**changes)
    assert str(error.value).startswith(start) and hint in str(error.value)


DATA = {
    "data.path=": {"data__path": "/nowhere/at/all"},
    "model.vocab_size=200": {"model__vocab_size": 200},
    "data.seq_len=99999": {"data__seq_len": 99999, "model__max_len": 99999},
}


@pytest.mark.parametrize("start", DATA)
def test_data_that_does_not_fit_leaves_no_workdir(start, tmp_path):
    with pytest.raises(UserError, match=f"^{start}"):
        train(tiny_config(train__batch_size=8, **DATA[start]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variants", [tiny, paper])
def test_variants_are_listed(variants):
    with pytest.raises(UserError) as error:
        variants.get_config("nope")
    assert ":nope" in str(error.value) and ", ".join(variants.VARIANTS) in str(error.value)


def test_paper_needs_a_variant():
    with pytest.raises(UserError, match="moe_aux"):
        paper.get_config()


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"train": 3}', '{"train": {"stepz": 3}}', '{"train": {"steps": 0}}']
)
def test_config_json_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"config\.json|config\.train\.step"):
        evaluate_workdir(tmp_path)
    assert contents(tmp_path) == before


def test_no_half_token_store_is_left():
    here = outcomes()["text that isn't UTF-8"][-1]
    assert not [path for path in Path(here, "cache", "tokens").iterdir() if path.is_dir()]


@pytest.mark.parametrize("flag", ["--debug", "--debug=true"])
def test_debug_shows_the_traceback(tmp_path, flag):
    status, _, stderr = run(
        ["train.py", CONFIG, f"--workdir={tmp_path / 'run'}", "--config.experts.top_k=9", flag]
    )
    assert status == 2
    assert "Traceback" in stderr and "in from_config_dict" in stderr
    assert stderr.splitlines()[-1].startswith("error: config.experts.top_k=9")


def test_debug_off(tmp_path):
    status, _, stderr = run(
        ["train.py", CONFIG, f"--workdir={tmp_path}", "--config.experts.top_k=9", "--nodebug"]
    )
    assert status == 2 and "Traceback" not in stderr


def test_configuration_that_exits_is_no_success(tmp_path):
    (tmp_path / "leaves.py").write_text(
        "import sys\n\n\ndef get_config():\n    sys.exit('no corpus')\n"
    )
    status, _, stderr = run(
        ["train.py", f"--config={tmp_path / 'leaves.py'}", f"--workdir={tmp_path / 'run'}"]
    )
    assert (
        status == 2
        and "get_config() called sys.exit('no corpus')" in stderr
        and not (tmp_path / "run").exists()
    )


def test_help_lists_the_flags():
    status, stdout, stderr = run(["train.py", "--help"])
    assert (
        status == 0 and "--workdir" in stdout and "--config" in stdout and "Traceback" not in stderr
    )

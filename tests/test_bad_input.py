"""A user's mistake ends with exit status 2 and one or two lines that name it; no file is
touched.
"""

import contextlib
import shutil
from dataclasses import dataclass, field

import jax
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.training.loop import train
from configs import paper, tiny
from tests import runs
from tests.in_process import execute
from tests.runs import STEPS, contents, finished_run, tiny_config

CONFIG = "--config=configs/tiny.py"
DASHES = ["train.py", "--workdir={workdir}", CONFIG]


@dataclass
class Mistake:
    """A command line and words of its message; `{workdir}` and `{here}` are folders of its own."""

    command: list
    words: list
    prepare: callable = lambda workdir, here: None
    changes: dict = field(default_factory=dict)  # of a training with the settings of `tests.runs`


def table(text, command):
    """The mistakes of a table: arguments => words, each separated by |."""
    lines = [line.split(" => ") for line in text.strip().splitlines()]
    return {given: Mistake(command(given.split(" | ")), said.split(" | ")) for given, said in lines}


OVERRIDES = """
experts.top_k=9 => config.experts.top_k=9 | n_experts=8
routing.name=top_p | routing.q=1 => config.routing.q is unknown | fields of routers are | p,
routing.name=top_p | routing.norm_topk_prob=true => norm_topk_prob is unknown | known are p
routing.name=top_p | routing.p=high => --config.routing.p=high | a number
routing.name=nope => config.routing.name='nope' | top_k, top_p
model.n_kv_heads=half => --config.model.n_kv_heads=half: must be a whole number or None
train.steps.x=1 => config.train.steps.x is unknown | batch_size
train.stepz=3 => config.train.stepz | unknown | steps, batch_size
train.warmup_steps=50 => train.warmup_steps is gone | config.train.warmup, a share of train.steps
nonsense.x=1 => config.nonsense | unknown | model, experts
train.steps=abc => --config.train.steps=abc | whole number
train.steps => --config.train.steps | Missing value
model.tie_embeddings=maybe => --config.model.tie_embeddings=maybe | true or false
model.d_model=4294967296 => --config.model.d_model=4294967296 | 2**31
data.name=sotu=0.9, text@/a=much => config.data.name='sotu | the weight 'much' of text@/a must be a
data.name=sotu=1e2000000000 => data.name='sotu=1e2000000000' | must be a number from 1e-15 to 1e15
data.name=sotu, lm1b | data.path=/a => config.data.path='/a' | NAME@PATH
mesh.expert=2 => config.mesh | expert=2 | product must be the number of devices, 1
mesh.expert=3 => config.mesh.expert=3 | must divide experts.n_experts=8
"""
FLAGS = """
--config=configs/tiny.py:nope => tiny.py:nope | aoe, moe, dense
--config=nope.py | --config.routing.p=0.5 => --config=nope.py | cannot be
--config=nope.py | --config.train.steps=3 => nope.py | no such file
--config=configs/methods.py:smear | --config.routing.name=top_k => 'smear' has no router
--foo => --foo is no flag
extra => 'extra' | --name=value
--processes=0 => --processes=0 | 0 is not a positive integer
--retry_seconds=-5 => --retry_seconds=-5: -5.0 is not a number in the range [0, 1000000]
--retry_seconds=1e300 => --retry_seconds=1e300 | is not a number in the range [0, 1000000]
--retry_seconds=nan => --retry_seconds=nan | must be finite
--profile=x => --profile=x | STEP:N | 20:3
--profile=1000000:9 => --profile=1000000:9 | the run ends at step
--start-over | --go-back=3 => --go-back=3 | without --start-over
--wandb= => --wandb= | name a project
--wandb=\udcff => --wandb= | must be UTF-8
--distributed => --distributed | no cluster | --coordinator
--coordinator=localhost:1 => --processes is missing | go together
--coordinator=localhost:1 | --processes=2 | --process=2 => --process=2 | --processes=2
--coordinator=here | --processes=2 | --process=0 => --coordinator=here | HOST:PORT
--coordinator=localhost:99999 | --processes=2 | --process=0 => :99999 | with a port below 65536
--coordinator=[::1]:1234 | --processes=2 | --process=1 => =[::1]:1234 | HOST:PORT of process 0
"""
CODE = {  # of a configuration file, and words of the message
    "x = 1\nx = (\n": ["SyntaxError", "line 2"],
    "def get_config():\n    return 1 / 0\n": ["ZeroDivisionError", "line 2"],
    "import sys\ndef get_config():\n    sys.exit('why')\n": ["get_config() called sys.exit('why')"],
    "def get_config():\n    pass\n": ["ConfigDict"],
}
OTHERS = """
train.py | --workdir={workdir} => --config is missing | configs/tiny.py
train.py | --config=configs/tiny.py => --workdir is missing
eval.py | --workdir={workdir} | --config.routing.p=0.5 => --config is missing
-m | aoe_jax.generate | --workdir={workdir} | --seed=9999999999 => --seed=9999999999 | 2**31
-m | aoe_jax.plan | --config=configs/tiny.py | --topology=v9:2x2 => --topology=v9:2x2 | v5p, v6e
-m | aoe_jax.plan | --config=configs/tiny.py | --topology=h100:8 => pip install 'jax[cuda13]'
-m | benchmarks.grouped_compile | --backends=mosaic => --backends=mosaic is unknown | blocked
"""


def with_file(name, text):
    return lambda workdir, here: (here / name).write_text(text)


BROKEN = "--config={here}/broken.py"
COMMAND_LINE = {
    **table(OVERRIDES, lambda given: [*DASHES, *(f"--config.{text}" for text in given)]),
    **table(FLAGS, lambda given: [*DASHES, *given]),
    **table(OTHERS, lambda given: given),
    **{
        text: Mistake([*DASHES, BROKEN], ["{here}/broken.py", *words], with_file("broken.py", text))
        for text, words in CODE.items()
    },
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
    runs.truncate_state(workdir)


def finished_and_truncated_alone(workdir, here):
    """Where there is another one, training goes on from that."""
    finished_and_truncated(workdir, here)
    for path in (workdir / "checkpoints").iterdir():
        if path.name != str(STEPS):
            shutil.rmtree(path)


def finished_and_changed_texts(workdir, here):
    finished(workdir, here)
    (here / "texts").mkdir()
    runs.write_texts(here / "texts", seed=1)


def empty_texts(workdir, here):
    (here / "texts").mkdir()


def latin_1_texts(workdir, here):
    (here / "texts").mkdir()
    for name in "abc":
        (here / "texts" / f"{name}.txt").write_bytes(b"caf\xe9")


TEXTS = {"data__path": "{here}/texts", "data__cache": "{here}/cache"}
TRAIN, EVAL = "train", ["eval.py", "--workdir={workdir}"]
LONGER = {"train__steps": STEPS + 1}


def without_checkpoints(workdir, here):
    finished(workdir, here)
    shutil.rmtree(workdir / "checkpoints")


RUNS = {
    "weights of trained models": Mistake(
        [*DASHES, "--config.experts.kind=router", "--config.routing.name=sparsemixer"],
        ["config.routing.name='sparsemixer'", "'top_k'"],
    ),
    "unknown data set": Mistake(
        TRAIN, ["data.name='lm1bb'", "lm1b"], changes={"data__name": "lm1bb"}
    ),
    "no token store": Mistake(
        TRAIN,
        ["'prepared' names {here}, which is no token store", "python -m aoe_jax.prepare"],
        changes={"data__name": "prepared", "data__path": "{here}"},
    ),
    "empty folder of texts": Mistake(
        TRAIN, ["data.path='{here}/texts'", "no .txt file"], empty_texts, TEXTS
    ),
    "text that is not UTF-8": Mistake(
        TRAIN, ["data.path='{here}/texts'", ".txt is not UTF-8"], latin_1_texts, TEXTS
    ),
    "steps reached": Mistake(TRAIN, [f"train.steps={STEPS}", f"already at step {STEPS}"], finished),
    "another configuration": Mistake(
        TRAIN,
        ["another configuration", "experts.d_low is 8 there, 16 here", "seed is 0 there, 1 here"],
        finished,
        {"experts__d_low": 16, "train__seed": 1, "train__steps": 99},
    ),
    "changed texts": Mistake(
        TRAIN, ["token store", "data.path"], finished_and_changed_texts, TEXTS | LONGER
    ),
    "the only checkpoint is truncated": Mistake(
        TRAIN,
        [f"{{workdir}}/checkpoints/{STEPS}", "is damaged", "there is no other"],
        finished_and_truncated_alone,
        LONGER,
    ),
    "config.json is nested deeply": Mistake(
        EVAL,
        ["{workdir}/config.json", "nested too deeply"],
        finished_with("config.json", '{"a":' * 99999),
    ),
    "data.json of another kind": Mistake(
        TRAIN,
        ["{workdir}/data.json", "token_stores[0] is 7, not a text"],
        finished_with("data.json", '{"token_stores": [7]}'),
        LONGER,
    ),
    "workdir is a file": Mistake(
        TRAIN, ["--workdir={workdir}", "file"], lambda workdir, here: workdir.write_text("mine")
    ),
    "workdir in the home of nobody": Mistake(
        ["train.py", CONFIG, "--workdir=~nobody.here/run"],
        ["--workdir=~nobody.here/run", "no such home directory"],
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
    "eval: no checkpoint": Mistake(
        EVAL, ["{workdir}", "no complete checkpoint"], without_checkpoints
    ),
    "eval: truncated checkpoint": Mistake(
        EVAL, [f"{{workdir}}/checkpoints/{STEPS}", "is damaged"], finished_and_truncated
    ),
    "eval: unknown split": Mistake(
        [*EVAL, "--split=train"], ["--split=train", "validation, test"], finished
    ),
}
MISTAKES = COMMAND_LINE | RUNS


AS_A_USER = {"--distributed", "unknown data set"}  # these start a process of their own
DEVICES = jax.devices()


@contextlib.contextmanager
def one_device():
    """JAX as it is in a process of one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.device_count", lambda: 1)
        patch.setattr("jax.devices", lambda *_: DEVICES[:1])
        patch.setattr("jax.local_devices", lambda *_, **__: DEVICES[:1])
        yield


def outcome(name, here):
    """Makes the mistake in a folder: `(exit status, stdout, stderr, files that changed)`."""
    mistake, workdir = MISTAKES[name], here / "run"
    mistake.prepare(workdir, here)
    before = contents(here)
    folders = {"here": here, "workdir": workdir}
    changes = {
        field: value.format(**folders) if isinstance(value, str) else value
        for field, value in mistake.changes.items()
    }
    command = mistake.command
    if command == TRAIN:
        command = runs.train_command(workdir, **changes)
    elif changes:
        command = [*command, *runs.train_command(here, **changes)[3:]]
    command = [word.format(**folders) for word in command]
    if name in AS_A_USER:
        result = runs.finish(runs.start(command, forked=False))
    else:
        with one_device():
            result = execute(command)
    after = contents(here)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    return *result, [path for path in changed if not path.startswith("cache/")]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, tmp_path):
    status, stdout, stderr, changed = outcome(name, tmp_path)
    assert status == 2, stderr
    assert stdout == ""
    progress, error, message = stderr.rpartition("error: ")
    assert error and len(message.splitlines()) <= 2
    # A run logs its progress until it finds the mistake; a wrong command line logs nothing.
    assert all(line[:2].isdigit() and line[2] == ":" for line in progress.splitlines())
    assert progress == "" or name in RUNS
    for word in MISTAKES[name].words:
        assert word.format(here=tmp_path, workdir=tmp_path / "run") in message
    assert "Traceback" not in stderr
    assert changed == []
    assert not (tmp_path / "run").exists() or MISTAKES[name].prepare is not Mistake.prepare


def test_no_half_token_store_is_left(tmp_path):
    outcome("text that is not UTF-8", tmp_path)
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


DATA = {
    "data.path=": {"data__path": "/nowhere/at/all"},
    "model.vocab_size=200": {"model__vocab_size": 200},
    "data.seq_len=99999": {"data__seq_len": 99999, "model__max_len": 99999},
}


@pytest.mark.parametrize("start", DATA)
def test_data_that_does_not_fit_leaves_no_workdir(start, tmp_path):
    with pytest.raises(UserError, match=f"^config.{start}"):
        train(tiny_config(train__batch_size=8, **DATA[start]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variants", [tiny, paper])
def test_variants_are_listed(variants):
    with pytest.raises(UserError) as error:
        variants.get_config("nope")
    assert ":nope" in str(error.value) and ", ".join(variants.VARIANTS) in str(error.value)
    with pytest.raises(UserError, match="moe_aux"):
        paper.get_config()  # which needs a variant


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


@pytest.mark.parametrize(
    ("flag", "shows"), [("--debug", True), ("--debug=true", True), ("--nodebug", False)]
)
def test_debug_shows_the_traceback(tmp_path, flag, shows):
    mistake = "--config.experts.top_k=9"
    status, _, stderr = execute(
        ["train.py", CONFIG, f"--workdir={tmp_path / 'run'}", mistake, flag]
    )
    assert status == 2 and ("Traceback" in stderr and "in from_config_dict" in stderr) == shows
    assert stderr.splitlines()[-1].startswith("error: config.experts.top_k=9")

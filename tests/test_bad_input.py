"""A user's mistake ends with exit status 2 and one or two lines that name it; no file is
touched.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass, field

import jax
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import evaluate_workdir
from aoe_jax.training.loop import train
from configs import paper, tiny
from tests.in_process import execute
from tests.runs import (
    STEPS,
    contents,
    finish,
    finished_run,
    start,
    tiny_config,
    train_command,
    truncate_state,
    write_texts,
)

CONFIG = "--config=configs/tiny.py"


@dataclass
class Mistake:
    """A command line and words of its message; `{workdir}` and `{here}` are folders of its own."""

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
    "field of no router": Mistake(
        wrong_config("routing.name=top_p", "routing.q=1"),
        ["config.routing.q is unknown", "fields of routers are", "norm_topk_prob", "p,"],
    ),
    "optional number": Mistake(
        wrong_config("model.n_kv_heads=half"),
        ["--config.model.n_kv_heads=half: must be a whole number or None"],
    ),
    "field of a field": Mistake(
        wrong_config("train.steps.x=1"), ["config.train.steps.x is unknown", "batch_size"]
    ),
    "mistyped field": Mistake(
        wrong_config("train.stepz=3"), ["config.train.stepz", "unknown", "steps, batch_size"]
    ),
    "unknown router": Mistake(
        wrong_config("routing.name=nope"), ["config.routing.name='nope'", "top_k, top_p"]
    ),
    "field of another router": Mistake(
        wrong_config("routing.name=top_p", "routing.norm_topk_prob=true"),
        ["config.routing.norm_topk_prob is unknown", "known are p"],
    ),
    "router's field of the wrong type": Mistake(
        wrong_config("routing.name=top_p", "routing.p=high"),
        ["--config.routing.p=high", "a number"],
    ),
    "router of a kind without one": Mistake(
        wrong_config("routing.name=top_k", config="--config=configs/methods.py:smear"),
        ["config.routing.name='top_k'", "experts.kind='smear' has no router"],
    ),
    "router's field without a configuration": Mistake(
        ["eval.py", "--workdir={workdir}", "--config.routing.p=0.5"], ["--config is missing"]
    ),
    "router's field of a missing file": Mistake(
        wrong_config("routing.p=0.5", config="--config=nope.py"), ["--config=nope.py", "cannot be"]
    ),
    "warm-up in steps": Mistake(
        wrong_config("train.warmup_steps=50"),
        ["config.train.warmup_steps is gone", "config.train.warmup, a share of train.steps"],
    ),
    "mistyped group": Mistake(
        wrong_config("nonsense.x=1"), ["config.nonsense", "unknown", "model, experts"]
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
        ["config.data.name='sotu=0.9, text@/a=much'", "the weight 'much' of text@/a must be a"],
    ),
    "weight with a huge exponent": Mistake(
        wrong_config("data.name=sotu=1e2000000000"),
        ["config.data.name='sotu=1e2000000000'", "must be a number from 1e-15 to 1e15"],
    ),
    "several corpora and one path": Mistake(
        wrong_config("data.name=sotu, lm1b", "data.path=/a"), ["config.data.path='/a'", "NAME@PATH"]
    ),
    "no value": Mistake(wrong_config("train.steps"), ["--config.train.steps", "Missing value"]),
    "unknown flag": Mistake(flags(CONFIG, "--foo"), ["--foo is no flag"]),
    "stray word": Mistake(flags(CONFIG, "extra"), ["'extra'", "--name=value"]),
    "mesh of other devices": Mistake(
        wrong_config("mesh.expert=2"),
        ["config.mesh", "expert=2", "product must be the number of devices, 1 "],
    ),
    "mesh that does not divide": Mistake(
        wrong_config("mesh.expert=3"), ["config.mesh.expert=3", "must divide experts.n_experts=8"]
    ),
    "too few processes": Mistake(
        flags(CONFIG, "--processes=0"), ["--processes=0", "0 is not a positive integer"]
    ),
    "negative time of retries": Mistake(
        flags(CONFIG, "--retry_seconds=-5"),
        ["--retry_seconds=-5: -5.0 is not a number in the range [0, 1000000]"],
    ),
    "endless retries": Mistake(
        flags(CONFIG, "--retry_seconds=1e300"),
        ["--retry_seconds=1e300", "is not a number in the range [0, 1000000]"],
    ),
    "time of retries that is no number": Mistake(
        flags(CONFIG, "--retry_seconds=nan"), ["--retry_seconds=nan", "must be finite"]
    ),
    "profile of no steps": Mistake(flags(CONFIG, "--profile=x"), ["--profile=x", "STEP:N", "20:3"]),
    "seed out of range": Mistake(
        ["-m", "aoe_jax.generate", "--workdir={workdir}", "--seed=99999999999999999999"],
        ["--seed=99999999999999999999", "smaller than 2**31"],
    ),
    "size out of range": Mistake(
        wrong_config("model.d_model=4294967296"), ["--config.model.d_model=4294967296", "2**31"]
    ),
    "name that is not UTF-8": Mistake(
        flags(CONFIG, "--wandb=\udcff"), ["--wandb=", "must be UTF-8"]
    ),
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
    "coordinator with a large port": Mistake(
        flags(CONFIG, "--coordinator=localhost:99999", "--processes=2", "--process=0"),
        ["--coordinator=localhost:99999", "with a port below 65536"],
    ),
    "coordinator with an IPv6 address": Mistake(
        flags(CONFIG, "--coordinator=[::1]:1234", "--processes=2", "--process=1"),
        ["--coordinator=[::1]:1234", "must be HOST:PORT of process 0"],
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
        ["--backends=mosaic is unknown", "blocked"],
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
    "config file that leaves": Mistake(
        flags("--config={here}/leaves.py"),
        ["get_config() called sys.exit('no corpus')"],
        with_file("leaves.py", "import sys\ndef get_config():\n    sys.exit('no corpus')\n"),
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
    "weights of trained models": Mistake(
        wrong_config("experts.kind=router", "routing.name=sparsemixer"),
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
    "no such corpus in a mixture": Mistake(
        TRAIN,
        ["data.name='lm1bb'", "lm1b"],
        empty_texts,
        {"data__name": "lm1bb, sotu", "data__path": None},
    ),
    "texts in the home of nobody": Mistake(
        TRAIN,
        ["config.data.path='~nobody.here/texts'", "no such home directory"],
        changes={"data__path": "~nobody.here/texts"},
    ),
    "empty folder of texts": Mistake(
        TRAIN, ["data.path='{here}/texts'", "no .txt file"], empty_texts, TEXTS
    ),
    "text that is not UTF-8": Mistake(
        TRAIN, ["data.path='{here}/texts'", ".txt is not UTF-8"], latin_1_texts, TEXTS
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
        finished_and_truncated_alone,
        {"train__steps": STEPS + 1},
    ),
    "config.json is not JSON": Mistake(
        TRAIN,
        ["{workdir}/config.json", "cannot be read"],
        finished_with("config.json", "{"),
        {"train__steps": STEPS + 1},
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
        {"train__steps": STEPS + 1},
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
        EVAL,
        ["{workdir}", "no complete checkpoint"],
        lambda workdir, here: shutil.copytree(
            finished_run(), workdir, ignore=shutil.ignore_patterns("checkpoints")
        ),
    ),
    "eval: truncated checkpoint": Mistake(
        EVAL, [f"{{workdir}}/checkpoints/{STEPS}", "is damaged"], finished_and_truncated
    ),
    "eval: changed texts": Mistake(EVAL, ["token store", "data.path"], finished_elsewhere),
    "eval: unknown split": Mistake(
        [*EVAL, "--split=train"], ["--split=train", "<validation|test>"], finished
    ),
}
MISTAKES = COMMAND_LINE | RUNS


AS_A_USER = {"no cluster", "unknown data set"}  # these start a process of their own
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
        command = train_command(workdir, **changes)
    elif changes:
        command = [*command, *train_command(here, **changes)[3:]]
    command = [word.format(**folders) for word in command]
    if name in AS_A_USER:
        result = finish(start(command, forked=False))
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


VALUES = {
    "config.experts.top_k=5": ({"experts__top_k": 5}, "n_experts=4"),
    "config.experts.d_low=32": ({"experts__d_low": 32}, "smaller than model.d_model=32"),
    "config.experts.d_low=0": ({"experts__d_low": 0}, "greater than 0"),
    "config.routing.name='top_q'": ({"routing__name": "top_q"}, "top_k, top_p, expert_choice"),
    "config.model.n_heads=3": ({"model__n_heads": 3}, "d_model=32"),
    "config.data.seq_len=65": ({"data__seq_len": 65}, "max_len=64"),
    "config.train.accumulate=3": ({"train__accumulate": 3}, "batch_size=4"),
    "config.train.warmup=1.0": ({"train__warmup": 1.0}, "at least 0 and below 1"),
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
    with pytest.raises(UserError, match=f"^config.{start}"):
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

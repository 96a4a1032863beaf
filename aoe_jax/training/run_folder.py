"""The directory of a run: its lease, the checks of its files, and `set_aside` for old files."""

import contextlib
import logging
import tempfile
import time
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from aoe_jax.config.checks import differences, require
from aoe_jax.config.run import Config
from aoe_jax.data.token_store import TOKENIZER_FILES
from aoe_jax.data.tokenised import TokenisedCorpus
from aoe_jax.distributed import agree, see_the_same, together
from aoe_jax.errors import UserError
from aoe_jax.storage import files
from aoe_jax.storage.config_files import read_run_config
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, read_json, write_json
from aoe_jax.storage.lease import leased, owner_of
from aoe_jax.storage.paths import REPORTS, Mirror, is_remote, move, size_and_version, unused
from aoe_jax.storage.retry import patiently
from aoe_jax.training.checkpoint import DAMAGED, Checkpoints

log = logging.getLogger(__name__)

_IDENTITY = ("config.json", "data.json")
# The files of a run, except its tokenizer, in the order in which `set_aside` moves them: the
# checkpoints first, so that `check_history` finds that they are missing after an interrupted move.
_FILES = (
    *("checkpoints", DAMAGED, "tensorboard", "profile", "wandb", "hang", *sorted(REPORTS)),
    *("routing.json", "training.png", "wandb.json", "summary.json"),
    *("metrics.jsonl", "samples.jsonl", "heartbeat.json", *_IDENTITY),
)
# A run in an object store first copies these files to its temporary folder `on_disk`.
_ON_DISK = ("metrics.jsonl", "samples.jsonl", "wandb.json")

# Groups and fields that may change when a run continues. Except `train.steps`, they do not change
# what a step computes. `check_data` checks the content of `data.path` and `data.tokenizer`.
FREE = {
    *("checkpoint", "mesh", "data.cache", "data.path", "data.tokenizer", "train.steps"),
    *("train.log_every", "train.eval_every", "train.sample_every", "train.max_skipped"),
    *("train.hang_timeout", "model.attention", "model.unroll", "experts.grouped_matmul"),
}


class RunFolder:
    """The workdir of a run, which all processes share and process 0 owns.

    `on_disk` is the folder for `metrics.jsonl`, `tensorboard/`, `profile/` and the like: the
    workdir or, for a workdir in an object store, a temporary folder that `upload` copies there.
    """

    def __init__(self, workdir: Path):
        self.workdir, self.on_disk = workdir, workdir
        self._lease = self._mirror = None

    def open(self, held: contextlib.ExitStack):
        """Acquires the lease until `held` is closed. Raises `InUse`, or `UserError` if a process
        sees no lease.
        """
        workdir, is_main = self.workdir, jax.process_index() == 0
        with together():
            if is_main:
                self._lease = held.enter_context(leased(workdir, "workdir"))
                for killed in () if is_remote(workdir) else workdir.glob("[chds]*.json*.*.partial"):
                    killed.unlink(missing_ok=True)  # a process was killed while it wrote the file
        token = self._lease.token if is_main else ""
        see_the_same(token, lambda: owner_of(workdir).get("token", ""), f"--workdir={workdir}")

    def begin(self, held, config: Config, corpus, start_over=False, go_back=None):
        """Fetches what `on_disk` needs. `start_over` moves the files of the old run to
        `set_aside/`, `go_back=STEP` only files newer than that checkpoint. Raises `UserError`
        before that if the run in the workdir could not continue from there with `config`, and in
        every process if their configurations or data differ.
        """
        workdir, is_main = self.workdir, jax.process_index() == 0
        fields = flatten_dict(config.to_dict(), sep=".")
        for name in ("data.cache", "data.path", "data.tokenizer"):  # the identities check content
            del fields[name]
        fields["data.name"] = config.data.name_without_paths
        text = f"{fields} {corpus.identities} {jax.config.jax_enable_x64}"
        agree("the configuration or data", text)
        with together():
            if is_main and go_back is not None:
                last, wanted = config.train.steps, f"must be at least --go-back={go_back}"
                require(go_back <= last, "train.steps", last, wanted)
                _check_identity(workdir)
                check_config(workdir, config)
                _check_x64(workdir)
                check_data(workdir, corpus)
            elif is_main and start_over and _is_model(workdir):
                check_config(workdir, config)  # refuses it
            if is_main and (start_over or go_back is not None):
                set_aside(workdir, go_back)
            if is_main and is_remote(workdir):
                self.on_disk = Path(held.enter_context(tempfile.TemporaryDirectory()))
                for name in _ON_DISK:
                    patiently(f"{workdir / name} cannot be read", lambda: self._fetch(name))
                self._mirror = Mirror(self.on_disk, workdir)

    def _fetch(self, name):
        if (file := self.workdir / name).exists():
            (self.on_disk / name).write_bytes(file.read_bytes())

    def check(self, config: Config, corpus: TokenisedCorpus, steps):
        """Raises `UserError` in every process if the files of the workdir belong to another run, or
        if the run has finished. `steps` are the steps of its complete checkpoints.
        """
        newest, last = max(steps, default=0), config.train.steps
        with together():
            has_ended = read_heartbeat(self.workdir)["status"] in (None, "finished")
            has_ended = has_ended and (self.workdir / "summary.json").exists()
            if newest > last or (newest == last and has_ended):
                wanted = f"{self.workdir} is already at step {newest}; raise it to go on"
                raise UserError(f"config.train.steps={last}: {wanted}, or use another --workdir")
            check_history(self.workdir, steps)
            check_config(self.workdir, config, has_begun=bool(steps))
            if steps:
                _check_x64(self.workdir)
                check_data(self.workdir, corpus)

    def check_lease(self):
        """Raises `UserError` if another process has taken over the lease. Only process 0 checks."""
        if self._lease:
            self._lease.check()

    def is_owner(self):
        """Whether this process still has the lease; it neither waits nor raises `UserError`."""
        return self._lease.is_held()

    def upload(self):
        """Copies `on_disk` to a workdir in an object store; raises the error of `check_lease`."""
        if self._mirror:
            self.check_lease()
            self._mirror.upload()

    def claim(self, config: Config, corpus: TokenisedCorpus):
        """Writes `config.json`, `data.json` and a copy of the tokenizer, and removes another one
        and `summary.json`; process 0 calls it after all checks.
        """
        tokenizer = corpus.tokenizer
        files.write_whole(self.workdir / tokenizer.name, tokenizer.read_bytes())
        identity = {"token_stores": corpus.identities, "x64": jax.config.jax_enable_x64}
        write_json(self.workdir / "data.json", identity)
        write_json(self.workdir / "config.json", config.to_stored())
        for other in (*({*TOKENIZER_FILES} - {tokenizer.name}), "summary.json"):
            (self.workdir / other).unlink(missing_ok=True)


def _fixed(config):
    """Returns `{field: value}` of the fields that must not change in a run."""
    groups = config.to_dict()
    groups["data"] |= {"name": config.data.name_without_paths}
    if not (config.experts.low_rank or config.experts.large_router):
        del groups["experts"]["d_low"]  # it has no effect
    fields = flatten_dict(groups, sep=".").items()
    return {name: value for name, value in fields if not {name.partition(".")[0], name} & FREE}


def check_config(workdir: Path, config: Config, has_begun=True):
    """Raises `UserError` if `workdir` contains an exported model, or if it contains a run that
    `has_begun` (saved a checkpoint) and a field outside `FREE` differs from `config`.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    differing = differences(_fixed(read_run_config(path)), _fixed(config)).values()
    if has_begun and differing:
        what = f"workdir {workdir} holds another configuration: {'; '.join(differing)}"
        raise UserError(f"{what}. Use another --workdir, or --start-over")


def check_history(workdir: Path, steps):
    """Raises `UserError` if checkpoints, `config.json` or `data.json` are missing. `steps` are
    the steps of complete checkpoints. A checkpoint in `damaged_checkpoints` is not missing.
    """
    if steps:
        _check_identity(workdir)
    metrics = workdir / "metrics.jsonl"
    lacks_all = not steps and not (workdir / "heartbeat.json").exists()
    if lacks_all and metrics.exists() and size_and_version(metrics)[0]:
        raise UserError(
            f"--workdir={workdir}: metrics.jsonl has steps of a run, but checkpoints/ has none. "
            "Bring them back; or --start-over begins anew"
        )
    newest, damaged = max(steps, default=0), workdir / DAMAGED
    saved = read_heartbeat(workdir)["saved"] or 0
    names = [path.name.partition("-")[0] for path in damaged.iterdir()] if damaged.is_dir() else []
    if saved > newest and not (steps and str(saved) in names):
        there = f"the newest checkpoint is of step {newest}" if newest else "checkpoints/ has none"
        goes_back = f"--go-back={newest} continues from that, and " if newest else ""
        raise UserError(
            f"--workdir={workdir}: heartbeat.json shows that a checkpoint of step {saved} was "
            f"complete, but {there}. Bring the missing ones back; or {goes_back}--start-over "
            "begins anew. Newer files are then moved to set_aside/"
        )


def _check_identity(workdir):
    if missing := [name for name in _IDENTITY if not (workdir / name).exists()]:
        raise UserError(
            f"--workdir={workdir} has checkpoints but no {missing[0]}, so they may be of another "
            "run. Bring it back; or --start-over begins anew"
        )


def _is_model(workdir):
    try:
        return "model_type" in read_json(workdir / "config.json")
    except UserError:  # a damaged file is set aside
        return False


def read_heartbeat(workdir: Path):
    """Returns `saved`, `began`, `status` of `heartbeat.json`; missing ones are None."""
    path = workdir / "heartbeat.json"
    schema = {"saved": files.or_none(COUNT), "began": files.or_none(NUMBER)}
    schema |= {"status": files.or_none(TEXT)}
    content = read_json(path, schema=schema) if path.exists() else {}
    return {name: content.get(name) for name in schema}


def set_aside(workdir: Path, go_back: int | None = None):
    """Moves the files of a run to a new folder in `workdir/set_aside`; with `go_back`, only files
    newer than the checkpoint of that step. Raises `UserError` if there is no such checkpoint.
    """
    names, metrics = list(_FILES), workdir / "metrics.jsonl"
    if go_back is not None:
        steps = Checkpoints(workdir).steps()
        if go_back not in steps:
            there = f"has checkpoints of steps {', '.join(map(str, steps)) or 'none'}"
            raise UserError(f"--go-back={go_back}: {workdir} {there}; give one of these steps")
        if metrics.exists():
            metrics.with_name("metrics.jsonl.whole").write_bytes(metrics.read_bytes())
        names = [f"checkpoints/{step}" for step in reversed(steps) if step > go_back]
        names += ["metrics.jsonl.whole", "summary.json", "training.png", *sorted(REPORTS)]
    folder = unused(workdir / "set_aside" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    moved = [name for name in names if (workdir / name).exists()]
    for name in moved:
        move(workdir / name, folder / name)
    if go_back is None and moved:
        for tokenizer in (workdir / name for name in TOKENIZER_FILES):
            if tokenizer.exists():  # copied, because `data.tokenizer` may name this file
                (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    if go_back is not None:  # written last, so that no run continues after an interrupted move
        found = read_heartbeat(workdir) | {"saved": go_back, "status": None}
        write_json(workdir / "heartbeat.json", found)
    if moved:
        log.info(f"moved {', '.join(sorted(moved))} to {folder}")


def check_data(workdir: Path, corpus: TokenisedCorpus):
    """Raises `UserError` if a corpus or the tokenizer has changed since the run began."""
    found = read_identities(workdir) or corpus.identities
    if found != corpus.identities:
        there, here = (", ".join(stores)[:1000] for stores in (found, corpus.identities))
        raise UserError(
            f"workdir {workdir} was trained on token store {there}, this is {here}: the text, its "
            "order or the tokenizer has changed. Correct data.path or data.name, or use another "
            "--workdir"
        )


def _check_x64(workdir):
    here = jax.config.jax_enable_x64
    before = read_json(workdir / "data.json").get("x64")  # None: a run of an older version
    if before not in (None, here):
        wanted = f"workdir {workdir} was trained with JAX_ENABLE_X64={before:d}; set it again"
        raise UserError(f"JAX_ENABLE_X64={here:d}: {wanted}")


def read_identities(workdir: Path) -> list[str]:
    """Reads the identities of a model's training corpora from `data.json`; [] without the file."""
    path = workdir / "data.json"
    if not path.exists():
        return []
    stores = read_json(path, schema={"token_stores": [TEXT]})["token_stores"]
    return [store.rpartition("-")[2] for store in stores]  # older versions wrote NAME-IDENTITY

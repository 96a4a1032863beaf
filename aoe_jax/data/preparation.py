"""Makes a token store from files of any size, in parallel. A killed preparation can continue.

`plan.json` divides the input into units of work, independently of the number of processes. A
process tokenises a unit, moves the finished shards into the store, and then writes a note, the file
`units/NUMBER.json`. A preparation that continues skips the units that have a note. When all units
have a note, `manifest.json` is written, and the store is complete.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import re
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.config.checks import require_flag
from aoe_jax.data import SPLITS, token_store
from aoe_jax.data.building import write_manifest, write_splits
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.data.plan_file import NEW_FOLDER, claimed_plan, read_plan
from aoe_jax.data.tokenizer import (
    MOST_TOKENS,
    TRAINING_CHARACTERS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from aoe_jax.errors import MachineFault, UserError
from aoe_jax.storage import retry
from aoe_jax.storage.files import TEXT, read_json, sync, write_json
from aoe_jax.storage.lease import leased
from aoe_jax.storage.paths import is_remote, put, remove_folder, size_and_version
from aoe_jax.storage.retry import patiently

logger = logging.getLogger(__name__)

_SAMPLE_CHARACTERS = 2**26  # of the sample that byte-level BPE is trained on
_SHARES = (0.005, 0.05, 0.1, 0.2, 0.3, 0.4)  # default of validation and test, by need
_MOST_EXAMINED = 100_000  # a corpus of more documents is not small
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+(?<!\.json)(?<!\.model)")  # ORG/NAME or NAME
_NOTE = {"splits": dict.fromkeys(SPLITS, token_store.SPLITS_SCHEMA), "fingerprint": TEXT}


@dataclass(frozen=True)
class Settings:
    """The settings of `prepare` that determine which tokens a split contains."""

    # Path of a tokenizer's file or of a folder with one, the name of a tokenizer on the Hugging
    # Face Hub, or `bpe:N`: byte-level BPE of N tokens, trained on a sample.
    tokenizer: str
    text_field: str = "text"  # the JSON field or Parquet column that contains the text

    # Fractions of the documents in validation and test. A hash of a document's text determines
    # its split, so that all copies of a document are in the same split. None: 0.005, or more if
    # a split of a small corpus would be empty.
    validation: float | None = None
    test: float | None = None

    def __post_init__(self):
        for name in ("validation", "test"):
            value, wanted = getattr(self, name), "must be a share of the documents"
            is_share = value is None or 0 < value < 0.5
            require_flag(is_share, name, value, f"{wanted}, above 0 and below 0.5")
        wanted = f"give bpe:N, N from 257 to {MOST_TOKENS} tokens; or a tokenizer's file"
        is_file = not self.tokenizer.startswith("bpe:")
        is_possible = is_file or 257 <= self.bpe_size <= MOST_TOKENS
        require_flag(is_possible, "tokenizer", repr(self.tokenizer), wanted)

    @property
    def bpe_size(self) -> int:
        """N if `tokenizer` is `bpe:N`, else 0."""
        size = re.fullmatch("bpe:([0-9]{1,8})", self.tokenizer)
        return int(size[1]) if size else 0

    def as_planned(self) -> dict:
        """The settings as `plan.json` stores them: with a tokenizer's hash, not its path."""
        planned = dataclasses.asdict(self)
        if not self.bpe_size:
            planned["tokenizer"] = load_tokenizer(self.tokenizer, setting="--tokenizer").sha256
        return planned


def prepare(
    inputs: Sequence[str],
    settings: Settings,
    output: Path,
    processes: int,
    engine: str = "local",
):
    """Makes a token store in `output`, or continues a store that the same call began.

    `inputs` are glob patterns for `find_files`. `output` is a new or empty folder, or has a
    store of the same inputs and settings. `engine` is "local" for `processes` on this machine, or
    "ray" for a Ray cluster; the content of the store does not depend on it.

    Raises:
      UserError: if an input or the tokenizer cannot be used, `output` has other files, a split
        would be empty, or there is no cluster.
      MachineFault: if the disk fails or is full, or a process is killed.
    """
    if engine == "ray":
        from aoe_jax import cluster

        cluster.connect()
    output = output if is_remote(output) else Path(os.path.abspath(output))
    settings = dataclasses.replace(settings, tokenizer=_found(settings.tokenizer))
    files = find_files(inputs, output)
    settings = patiently("--input cannot be read", lambda: _with_all_splits(settings, files))
    planned = settings.as_planned()
    with leased(output, "output"):
        what = f"{output} cannot be prepared"
        plan = patiently(what, lambda: claimed_plan(files, planned, output))
        if (output / "manifest.json").exists():
            token_store.read_manifest(output)  # raises if it is damaged
            remove_folder(output / "units")
            logger.info(f"{output} is complete already; --check verifies its shards")
            return
        units = range(len(plan["units"]))
        missing = [unit for unit in units if not _note(output, unit).exists()]
        if n_done := len(units) - len(missing):
            logger.info(f"going on: {n_done} of {len(units)} units of work are done")
        try:
            tokenizer = patiently(what, lambda: install_tokenizer(output, plan, settings))
            _write_units(output, plan, missing, processes, engine)
            results = [read_json(_note(output, unit), NEW_FOLDER, _NOTE) for unit in units]
            patiently(what, lambda: _finish(output, plan, tokenizer, results))
        except UserError:  # a first try with a mistake must not prevent the second try
            patiently(what, lambda: _remove_unless_begun(output, len(units)))
            raise


def _remove_unless_begun(output: Path, n_units: int):
    """Removes what a preparation has written, unless it has finished a unit of work."""
    names = {path.name for path in output.iterdir()}  # raises if permission is missing
    with contextlib.suppress(FileNotFoundError):
        names |= {path.name for path in (output / "units").iterdir()}
    done = names & {_note(output, unit).name for unit in range(n_units)}
    if done or "manifest.json" in names:
        kept = f"{output} keeps {len(done)} of {n_units} units of work; the same command continues"
        logger.info(f"{kept}. If settings or files change: {NEW_FOLDER}")
        return
    shards = filter(token_store.SHARD.fullmatch, names)
    tokenizer = token_store.saved_tokenizer(output).name
    for name in ("units", *shards, tokenizer, token_store.PLAN_FILE):
        remove_folder(output / name)


def _found(tokenizer: str) -> str:
    """Returns a path or `bpe:N` as it is; downloads `ORG/NAME` from the Hub, and returns a path."""
    if os.path.exists(tokenizer) or not _HUB_NAME.fullmatch(tokenizer):
        return tokenizer
    what = f"--tokenizer={tokenizer!r}: no such file or folder, and the Hugging Face Hub fails"
    files = [*token_store.TOKENIZER_FILES]
    # The library has no common type for its exceptions.
    with retry.refusing(what, "; correct the path or the name", Exception):
        from huggingface_hub import snapshot_download

        return patiently(what, lambda: snapshot_download(tokenizer, allow_patterns=files))


def _with_all_splits(settings: Settings, files: Mapping) -> Settings:
    """Sets the shares that are None: the smallest of `_SHARES` with which no split is empty."""
    given = {name: getattr(settings, name) for name in ("validation", "test")}
    whole = (pieces_of(path, size, max(size, 1)) for path, (size, _) in files.items())
    pieces = (piece for piece, _ in itertools.chain.from_iterable(whole))
    texts = (text for piece in pieces for text in documents(piece, settings.text_field) if text)
    shares = {name: share or _SHARES[0] for name, share in given.items()}
    digests, found = set(), set()
    for count, text in enumerate(texts, 1):
        digests.add(digest := _digest(text))
        found.add(_split(digest, shares))
        if len(found) == len(SPLITS) or count == _MOST_EXAMINED:
            return dataclasses.replace(settings, **shares)
    for larger in _SHARES[1:]:
        shares = {name: share or larger for name, share in given.items()}
        if len({_split(digest, shares) for digest in digests}) == len(SPLITS):
            validation, test = (f"{100 * share:g}%" for share in shares.values())
            held_out = f"{validation} of its documents are held out for validation, {test} for test"
            logger.info(f"the corpus is small: {held_out}")
            return dataclasses.replace(settings, **shares)
    flags = "".join(f", or leave out --{name}={share}" for name, share in given.items() if share)
    wanted = f"are too few for the splits train, validation and test; give more{flags}"
    raise UserError(f"--input: {len(digests)} different documents with text {wanted}")


def _finish(output: Path, shares: Mapping, tokenizer: Tokenizer, results: list[dict]):
    splits = {name: {"tokens": 0, "documents": 0, "bytes": 0, "shards": []} for name in SPLITS}
    for result in results:
        for name, part in result["splits"].items():
            for key, value in part.items():
                splits[name][key] += value
    for name in ("validation", "test"):
        wanted = "no document is in this split; use a larger share and another --output"
        require_flag(splits[name]["documents"], name, shares[name], wanted)
    hashes = "".join(result["fingerprint"] for result in results)
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
    write_manifest(output, output.name, fingerprint, tokenizer, splits)
    remove_folder(output / "units")
    for name, split in splits.items():
        logger.info(
            f"{name}: {split['documents']} documents, {split['tokens']} tokens, "
            f"{split['bytes']} bytes of text, {len(split['shards'])} shards"
        )
    logger.info(
        f"wrote {output}; train on it with --config.data.name=prepared "
        f"--config.data.path={shlex.quote(str(output))}"
    )


def check(output: Path) -> list[str]:
    """Returns the names of damaged or missing shards of a store. Raises `UserError` if the store
    is unfinished, or if its manifest or tokenizer is damaged.
    """
    manifest, file = token_store.read_manifest(output), token_store.saved_tokenizer(output)
    if load_tokenizer(file, setting="tokenizer").sha256 != manifest["tokenizer_sha256"]:
        raise UserError(f"{file} is not the tokenizer of this store; restore the original file")
    hashes = _hashes_of_shards(manifest).items()
    bar = tqdm(hashes, desc=f"checking {output.name}", unit="shard", delay=1)
    return [name for name, sha256 in bar if _hash_of(output / name) != sha256]


def _hash_of(shard: Path) -> str | None:
    with contextlib.suppress(OSError):  # the shard is missing or is not a file
        return patiently(f"{shard} cannot be read", lambda: token_store.file_sha256(shard))


def install_tokenizer(output: Path, plan: dict, settings: Settings) -> Tokenizer:
    """Returns the tokenizer in `output`. If none is there, trains one or copies the given one."""
    if token_store.saved_tokenizer(output).exists():
        return load_tokenizer(token_store.saved_tokenizer(output), setting="tokenizer")
    if not settings.bpe_size:
        tokenizer = load_tokenizer(settings.tokenizer, setting="--tokenizer")
    else:
        logger.info("training a tokenizer on a sample of the text")
        tokenizer = train_tokenizer(_sample(plan), settings.bpe_size)
    tokenizer.save(output)
    return tokenizer


def _sample(plan: dict) -> Iterator[str]:
    """Yields documents of the train split, from the beginning of each unit of work."""
    for unit in range(len(plan["units"])):
        left = _SAMPLE_CHARACTERS // len(plan["units"])
        for split, text in _documents(plan, unit, hashlib.sha256()):
            if split == "train":
                yield text
                left -= min(len(text), TRAINING_CHARACTERS)
            if left <= 0:
                break


def _write_units(output: Path, plan: dict, units: list[int], processes: int, engine: str):
    if not is_remote(output):
        (output / "units").mkdir(exist_ok=True)
        for killed in (output / "units").glob("*.partial-*"):
            remove_folder(killed)
        for killed in output.glob("*.json.*partial"):
            killed.unlink(missing_ok=True)
    sizes = [unit["size"] for unit in plan["units"]]
    done = sum(sizes) - sum(sizes[unit] for unit in units)
    bar = tqdm(desc="preparing", total=sum(sizes), initial=done, unit="B", unit_scale=True)
    calls = [(output, unit) for unit in units]
    if engine == "local":
        written = _in_processes(calls, processes)
    else:
        from aoe_jax import cluster

        written = cluster.results(write_unit, calls, {"num_cpus": 1})
    with bar, logging_redirect_tqdm([logging.getLogger("aoe_jax")]), contextlib.closing(written):
        for (_, unit), _ in written:
            bar.update(sizes[unit])


def _in_processes(calls, processes: int):
    """Yields `(call, None)` for each of `calls`, arguments of `write_unit`, as they end."""
    # Forking is unsafe, because a lock of another thread would stay locked in the new process.
    spawning = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawning, _begin_process, (retry.retry_seconds,))
    with pool:
        try:
            writing = {pool.submit(write_unit, *call): call for call in calls}
            for written in as_completed(writing):
                yield writing[written], written.result()
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, BrokenProcessPool):
                raise MachineFault(
                    f"--processes={processes}: a process was killed; if memory ran out, use fewer. "
                    "The same command continues the work"
                ) from error
            raise


def _begin_process(retry_seconds: float):
    """Sets up a process of the pool. The process ends when its parent process ends."""
    retry.retry_seconds = retry_seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent process handles Ctrl-C

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def write_unit(output: Path, unit: int):
    """Writes the shards of a unit of work, then its note. Raises `UserError` if the input of the
    unit has changed since the preparation began.
    """
    plan, tokenizer = _opened(output)
    file = plan["files"][plan["units"][unit]["pieces"][0][0]][0]
    what = f"{file} (unit {unit} of {output}) cannot be processed"
    patiently(what, lambda: _write_at_once(output, plan, unit, tokenizer))


def _write_at_once(output: Path, plan: dict, unit: int, tokenizer: Tokenizer):
    units = None if is_remote(output) else output / "units"
    with TemporaryDirectory(dir=units, prefix=f"{unit:05d}.partial-") as folder:
        fingerprint = hashlib.sha256()
        texts = _documents(plan, unit, fingerprint)
        splits = write_splits(Path(folder), texts, tokenizer, f"-{unit:05d}")
        result = {"splits": splits, "fingerprint": fingerprint.hexdigest()}
        for number in sorted({number for number, _, _ in plan["units"][unit]["pieces"]}):
            (path, *before), now = plan["files"][number], None
            with contextlib.suppress(FileNotFoundError):
                now = [*size_and_version(path)]
            if now != before:
                changed = f"{path} has changed since the preparation began"
                raise UserError(f"--input: {changed}. Prepare it again, into a new folder")
        for shard in _hashes_of_shards(result):
            put(Path(folder, shard), output / shard)
        if not is_remote(output):
            sync(output)  # the shards must be on the disk before the note says that they are
        write_json(_note(output, unit), result)


@functools.cache
def _opened(output: Path) -> tuple[dict, Tokenizer]:
    """Returns the plan and the tokenizer in `output`. Each process reads them only once."""
    return read_plan(output), load_tokenizer(token_store.saved_tokenizer(output), threads=1)


def _documents(plan: dict, unit: int, fingerprint) -> Iterator[tuple[str, str]]:
    """Yields `(split, text)` of each non-empty document of a unit, and updates `fingerprint`, a
    hash object of `hashlib`, with the hash of each text.
    """
    for number, start, stop in plan["units"][unit]["pieces"]:
        piece = Piece(plan["files"][number][0], start, stop)
        for text in filter(None, documents(piece, plan["text_field"])):
            digest = _digest(text)
            fingerprint.update(digest)
            yield _split(digest, plan), text


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _split(digest: bytes, shares: Mapping) -> str:
    chance = int.from_bytes(digest[:8], "big") / 2**64
    if chance < shares["validation"]:
        return "validation"
    return "test" if chance < shares["validation"] + shares["test"] else "train"


def _note(output: Path, unit: int) -> Path:
    return output / "units" / f"{unit:05d}.json"


def _hashes_of_shards(result: dict) -> dict[str, str]:
    return {
        shard["name"]: shard["sha256"]
        for split in result["splits"].values()
        for shard in split["shards"]
    }

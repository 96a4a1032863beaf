"""Makes a token store from files of any size, in parallel; after a kill it continues.

`plan.json` cuts the input into units of work, independently of the number of processes. The shards
of a unit are moved into the store when they are complete, then a file in `units/` notes it; a
preparation that continues skips these units. When all units are done, `manifest.json` makes the
folder a token store. `plan.json` stays, for damaged shards to be written again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.config.checks import require_flag
from aoe_jax.data import SPLITS
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.data.token_store import (
    PLAN_FILE,
    SPLITS_SCHEMA,
    file_sha256,
    read_manifest,
    write_manifest,
    write_splits,
)
from aoe_jax.data.tokenizer import (
    MOST_TOKENS,
    TRAINING_CHARACTERS,
    Tokenizer,
    load_tokenizer,
    saved_tokenizer,
    train_tokenizer,
)
from aoe_jax.data.workers import work_through
from aoe_jax.errors import Failure, MachineFault, UserError
from aoe_jax.storage.files import COUNT, NUMBER, TEXT, Kind, read_json, write_json
from aoe_jax.storage.lease import NAME, leased
from aoe_jax.storage.paths import is_remote, put, remove_folder, size_and_version
from aoe_jax.storage.retry import is_fault, patiently_if_allowed, reason

logger = logging.getLogger(__name__)

_UNITS = 512  # the number of units of work, if their size allows it
_UNIT_BYTES = (2**22, 2**29)  # the smallest and largest size of a unit
_TRAINING_BYTES = 2**26  # text that byte-level BPE is trained on
_PLAN_BYTES = 2**28  # the largest plan.json, enough for two million files


def _is_state(value):
    is_list = isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)
    return is_list and all(map(NUMBER.holds, value[1:]))


_PLAN = {
    "tokenizer": TEXT,
    "text_field": TEXT,
    "validation": NUMBER,
    "test": NUMBER,
    "files": [Kind("a file's path, size and version", _is_state)],
    "units": [{"size": COUNT, "pieces": [[COUNT]]}],
}
_UNIT = {"splits": dict.fromkeys(SPLITS, SPLITS_SCHEMA), "fingerprint": TEXT, "empty": COUNT}


@dataclass(frozen=True)
class Settings:
    """Settings that the tokens depend on."""

    # A tokenizer's file, or `bpe:N`: byte-level BPE of N tokens, trained on a sample.
    tokenizer: str
    text_field: str = "text"  # the field or column of JSON lines and Parquet that holds the text
    # Shares of the documents. A hash of its text decides on the split of a document, so that copies
    # of a document are in one split.
    validation: float = 0.005
    test: float = 0.005

    def __post_init__(self):
        for name in ("validation", "test"):
            value, wanted = getattr(self, name), "must be a share of the documents below 0.5"
            require_flag(0 < value < 0.5, name, value, f"{wanted}, above 0")
        size = self.bpe_size
        wanted = f"give bpe:N, N from 257 to {MOST_TOKENS} tokens; or a tokenizer's file"
        is_size = size is None or (
            size.isdecimal() and len(size) <= 8 and 257 <= int(size) <= MOST_TOKENS
        )
        require_flag(is_size, "tokenizer", repr(self.tokenizer), wanted)

    @property
    def bpe_size(self) -> str | None:
        """N as a text, if `tokenizer` is `bpe:N`."""
        made = self.tokenizer.startswith("bpe:")
        return self.tokenizer.removeprefix("bpe:") if made else None

    def as_planned(self) -> dict:
        """The settings as `plan.json` has them; for a tokenizer's file its hash."""
        planned = dataclasses.asdict(self)
        if self.bpe_size is None:
            planned["tokenizer"] = load_tokenizer(self.tokenizer, setting="--tokenizer").sha256
        return planned


def prepare(inputs: Sequence[str], settings: Settings, output: Path, processes: int):
    """Makes a token store in `output`, or continues one that the same call began.

    `inputs` are glob patterns, see `find_files`. `output` is empty, new, or of the same
    preparation. The store does not depend on the number of `processes`. Raises `UserError` if an
    input or the tokenizer cannot be used, `output` belongs to another preparation, or a split would
    be empty, and `MachineFault` if the disk is full.
    """
    planned, files = settings.as_planned(), find_files(inputs, _absolute(output))
    with leased(output, "output"), _faults_are_named(output):
        what = f"{output} cannot be prepared"
        plan = patiently_if_allowed(what, lambda: _claim(files, planned, output))
        with contextlib.suppress(UserError):  # no manifest, or half of one before a power cut
            read_manifest(output)
            remove_folder(output / "units")
            logger.info(f"{output} is complete already; --check reads it whole")
            return
        tokenizer = patiently_if_allowed(what, lambda: install_tokenizer(output, plan, settings))
        n_units = len(plan["units"])
        there = {path.name for path in output.iterdir()}
        missing = [unit for unit in range(n_units) if not _is_done(output, unit, there)]
        if n_done := n_units - len(missing):
            logger.info(f"going on: {n_done} of {n_units} units of work are done")
        started = time.monotonic()
        _write_units(output, plan, processes, missing)
        seconds = time.monotonic() - started
        results = [_read_unit(output, unit) for unit in range(n_units)]
        patiently_if_allowed(what, lambda: _finish(output, settings, tokenizer, results))
        written = [split["bytes"] for unit in missing for split in results[unit]["splits"].values()]
        rate = sum(written) / seconds / 1e6
        logger.info(
            f"{rate:.1f} MB of text a second, {rate / processes:.1f} for each of {processes} "
            "processes"
        )
        logger.info(
            f"wrote {output}; train on it with --config.data.name=prepared "
            f"--config.data.path={shlex.quote(str(_absolute(output)))}"
        )


def _finish(output: Path, settings: Settings, tokenizer: Tokenizer, results: list[dict]):
    splits = {name: {"tokens": 0, "documents": 0, "bytes": 0, "shards": []} for name in SPLITS}
    for result in results:
        for name, part in result["splits"].items():
            for key, value in part.items():
                splits[name][key] += value
    for name, split in splits.items():
        if split["documents"] == 0:
            share = "" if name == "train" else f"--{name}={getattr(settings, name)}: "
            n_documents = sum(split["documents"] for split in splits.values())
            raise UserError(
                f"{share}the {name} split got none of {n_documents} documents; delete {output}, "
                "and prepare it with other shares or more documents"
            )
    hashes = "".join(result["fingerprint"] for result in results)
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
    write_manifest(output, _absolute(output).name, fingerprint, tokenizer, splits)
    remove_folder(output / "units")
    if n_empty := sum(result["empty"] for result in results):
        logger.warning(f"left out {n_empty} documents without text")
    for name, split in splits.items():
        logger.info(
            f"{name}: {split['documents']} documents, {split['tokens']} tokens, "
            f"{split['bytes']} bytes of text, {len(split['shards'])} shards"
        )


def check(output: Path) -> list[str]:
    """The names of the damaged or missing shards of a complete store. Raises `UserError` if it is
    incomplete, or its manifest or its tokenizer is damaged.
    """
    manifest, file = read_manifest(output), saved_tokenizer(output)
    if load_tokenizer(file, setting="tokenizer").sha256 != manifest["tokenizer_sha256"]:
        raise UserError(f"{file} is not the tokenizer of this store; bring that file back")
    hashes, damaged = _hashes_of_shards(manifest), []
    for name in tqdm(hashes, desc=f"checking {output.name}", unit="shard", delay=1):
        file, found = output / name, None
        with contextlib.suppress(OSError):  # it is missing, or no file
            what = f"{file} cannot be read"
            found = patiently_if_allowed(what, functools.partial(file_sha256, file))
        if found != hashes[name]:
            damaged.append(name)
    return damaged


def repair(output: Path, processes: int, inputs: Sequence[str] = ()) -> list[str]:
    """Writes the damaged shards of a complete store again, from its input; returns their names.
    Raises `UserError` as `check` does, if the input is missing or has changed, or if it is in an
    object store and `inputs`, glob patterns, do not match it: somebody else may have made the plan.
    """
    wanted = f"has no {PLAN_FILE}, so it cannot be repaired; prepare it again"
    require_flag((output / PLAN_FILE).exists(), "output", output, wanted)
    with leased(output, "output"), _faults_are_named(output):
        damaged = check(output)
        if damaged:
            plan = _read_plan(output, "prepare it again, in another folder")
            named = set(map(os.fspath, find_files(inputs, _absolute(output))))
            for path, *_ in plan["files"]:
                wanted = f"its {PLAN_FILE} names input in an object store, {path}; allow that by "
                is_allowed = not is_remote(path) or path in named
                require_flag(is_allowed, "output", output, f"{wanted}--input")
            units = sorted({int(name.split("-")[1].split(".")[0]) for name in damaged})
            wanted = f"{PLAN_FILE} is that of another store; prepare it again, in another folder"
            require_flag(units[-1] < len(plan["units"]), "output", output, wanted)
            _write_units(output, plan, processes, units)
            remove_folder(output / "units")
    return damaged


def _absolute(path):
    return path if is_remote(path) else Path(os.path.abspath(path))


def make_plan(files: Mapping, planned: dict) -> dict:
    """The content of `plan.json`, from which the store follows: the settings as `planned`, the
    `files` of `find_files`, and the `units`, lists of pieces `[number of the file, start, stop]`.
    """
    states = [[str(path), *state] for path, state in files.items()]
    smallest, largest = _UNIT_BYTES
    unit_bytes = min(max(sum(size for _, size, _ in states) // _UNITS, smallest), largest)
    units = []
    with ThreadPoolExecutor() as pool:  # reads the metadata of Parquet files
        pieces = pool.map(lambda path: pieces_of(path, files[path][0], unit_bytes), files)
        for number, parts in enumerate(pieces):
            for piece, size in parts:
                if not units or units[-1]["size"] >= unit_bytes:
                    units.append({"size": 0, "pieces": []})
                units[-1]["size"] += size
                units[-1]["pieces"].append([number, piece.start, piece.stop])
    return planned | {"files": states, "units": units}


def _read_plan(output: Path, wanted: str) -> dict:
    plan = read_json(output / PLAN_FILE, wanted, _PLAN, _PLAN_BYTES)
    n_files = len(plan["files"])
    for unit in plan["units"]:
        pieces = unit["pieces"]
        is_whole = pieces and all(len(piece) == 3 and piece[0] < n_files for piece in pieces)
        require_flag(is_whole, "output", output, f"its {PLAN_FILE} is damaged; {wanted}")
    return plan


def _read_unit(output: Path, unit: int) -> dict:
    return read_json(_done_file(output, unit), "delete the folder", _UNIT)


def _claim(files: Mapping, planned: dict, output: Path) -> dict:
    """The plan of `output`, made if there is none; refuses one of other settings or files."""
    if not (output / PLAN_FILE).exists():
        names = {path.name for path in output.iterdir()} - {f"{PLAN_FILE}.partial"}
        is_empty = all(name.startswith(NAME) for name in names)
        wanted = "is not empty, and holds no preparation; use another --output"
        require_flag(is_empty, "output", output, wanted)
        write_json(output / PLAN_FILE, make_plan(files, planned), indent=None)
    plan = _read_plan(output, "delete the folder, or use another --output")
    advice, holds = "Delete the folder, or use another --output", "holds a preparation of"
    for name, here in planned.items():
        there = plan.get(name)
        other = f"{holds} something else: {name} is {there!r} there, {here!r} here. {advice}"
        require_flag(there == here, "output", output, other)
    found = {str(path): state for path, state in files.items()}
    for path, *state in plan["files"]:
        more = f"{holds} more files: {path} is gone, or not named here. {advice}"
        require_flag(path in found, "output", output, more)
        _refuse_change(path, state, found.pop(path), advice)
    if new := list(found):
        logger.warning(
            f"{len(new)} files, such as {new[0]}, are left out: this preparation began without them"
        )
    return plan


def _refuse_change(path: str, before: list, now: Sequence[int], advice: str):
    if before != [*now]:
        raise UserError(f"--input: {path} has changed since the preparation began. {advice}")


@contextlib.contextmanager
def _faults_are_named(output: Path) -> Iterator[None]:
    try:
        yield
    except MachineFault as error:  # of a unit of work, or from `patiently`
        error.add_note("the same command goes on where it was")
        raise
    except Exception as error:  # array_record raises RuntimeError, tokenizers bare Exception
        if isinstance(error, Failure) or not is_fault(error):
            raise
        raise MachineFault(
            f"--output={output}: {reason(error)}; the same command goes on where it was"
        ) from error


def install_tokenizer(output: Path, plan: dict, settings: Settings) -> Tokenizer:
    """The tokenizer in `output`; if it is missing, it is trained or copied there first."""
    if saved_tokenizer(output).exists():
        return load_tokenizer(saved_tokenizer(output), setting="tokenizer")
    if settings.bpe_size is None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        logger.info("training a tokenizer on a sample of the text")
        tokenizer = train_tokenizer(_sample(plan), int(settings.bpe_size))
    tokenizer.save(output)
    return tokenizer


def _sample(plan: dict) -> Iterator[str]:
    """Training documents from the beginning of each unit of work."""
    for unit in range(len(plan["units"])):
        left = _TRAINING_BYTES // len(plan["units"])
        for split, text, _, _ in _documents(plan, unit):
            if split == "train":
                yield text
                left -= min(len(text), TRAINING_CHARACTERS)
            if left <= 0:
                break


def _write_units(output: Path, plan: dict, processes: int, units: list[int]):
    if not is_remote(output):
        wanted = "its units is a link, and files behind it would be deleted; remove the link"
        require_flag(not (output / "units").is_symlink(), "output", output, wanted)
        (output / "units").mkdir(exist_ok=True)
        for killed in (output / "units").glob("*.partial-*"):
            remove_folder(killed)
    sizes = [unit["size"] for unit in plan["units"]]
    total, done = sum(sizes), sum(sizes) - sum(sizes[unit] for unit in units)
    # Bytes that the processes have read of each unit.
    read = multiprocessing.get_context("spawn").Array("q", len(sizes), lock=False)
    names = {unit: f"{_pieces(plan, unit)[0].path} (unit {unit} of {output})" for unit in units}
    bar = tqdm(
        desc="preparing", total=total, initial=done, unit="B", unit_scale=True, mininterval=1
    )
    work = contextlib.closing(work_through(names, processes, unit_writer, (output, read)))
    with bar, logging_redirect_tqdm([logging.getLogger("aoe_jax")]), work as steps:
        for _ in steps:
            bar.update(min(done + sum(read), total) - bar.n)


def unit_writer(output: Path, read: MutableSequence[int]) -> Callable[[int], None]:
    """The function that writes the shards of a unit of work, then the file that notes it.

    `read` receives the number of bytes read of each unit. The function raises `UserError` if the
    input has changed; in a repair, if the shards would differ.
    """
    plan = _read_plan(output, "prepare it again, in another folder")
    tokenizer = load_tokenizer(saved_tokenizer(output), 1)
    expected = None
    with contextlib.suppress(UserError):  # only a repair writes to a complete store
        expected = _hashes_of_shards(read_manifest(output))

    def write(unit: int):
        notes, prefix = None if is_remote(output) else output / "units", f"{unit:05d}.partial-"
        with TemporaryDirectory(dir=notes, prefix=prefix) as new:
            result = _tokenise(unit, plan, tokenizer, Path(new), read)
            shards = _hashes_of_shards(result)
            files = sorted({file for file, _, _ in plan["units"][unit]["pieces"]})
            if expected is None:
                for path, *state in (plan["files"][file] for file in files):
                    advice, now = f"Delete {output}, and prepare it again", ()
                    with contextlib.suppress(FileNotFoundError):
                        now = size_and_version(path)
                    _refuse_change(path, state, now, advice)
            elif not shards.items() <= expected.items():
                first, *_ = plan["files"][files[0]]
                raise UserError(f"{first} has changed since the store was made; prepare it again")
            for shard in shards:
                put(Path(new, shard), output / shard)
            write_json(_done_file(output, unit), result)

    return write


def _tokenise(
    unit: int, plan: dict, tokenizer: Tokenizer, folder: Path, read: MutableSequence[int]
) -> dict:
    fingerprint, n_empty = hashlib.sha256(), 0

    def texts() -> Iterator[tuple[str, str]]:
        nonlocal n_empty
        for split, text, digest, n_read in _documents(plan, unit):
            read[unit] = n_read
            if text:
                fingerprint.update(digest)
                yield split, text
            else:
                n_empty += 1

    splits = write_splits(folder, texts(), tokenizer, f"-{unit:05d}")
    read[unit] = plan["units"][unit]["size"]
    return {"splits": splits, "fingerprint": fingerprint.hexdigest(), "empty": n_empty}


def _pieces(plan: dict, unit: int) -> list[Piece]:
    files = plan["files"]
    return [Piece(files[n][0], start, stop) for n, start, stop in plan["units"][unit]["pieces"]]


def _documents(plan: dict, unit: int) -> Iterator[tuple[str, str, bytes, int]]:
    """Yields `(split, text, hash of the text, bytes read of the unit so far)` of each document."""
    before = 0
    for piece in _pieces(plan, unit):
        read = 0
        for text, read in documents(piece, plan["text_field"]):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            chance, split = int.from_bytes(digest[:8], "big") / 2**64, "train"
            if chance < plan["validation"]:
                split = "validation"
            elif chance < plan["validation"] + plan["test"]:
                split = "test"
            yield split, text, digest, before + read
        before += read


def _done_file(output: Path, unit: int) -> Path:
    return output / "units" / f"{unit:05d}.json"


def _is_done(output: Path, unit: int, there: set[str]) -> bool:
    with contextlib.suppress(UserError):
        # After a power cut, shards may be missing although they were noted.
        return _hashes_of_shards(_read_unit(output, unit)).keys() <= there
    return False


def _hashes_of_shards(result: dict) -> dict[str, str]:
    return {
        shard["name"]: shard["sha256"]
        for split in result["splits"].values()
        for shard in split["shards"]
    }

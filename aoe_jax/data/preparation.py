"""Makes a token store from files of any size, in parallel; a kill loses little and changes nothing.

`plan.json` cuts the input into units of work, independently of the number of processes. The shards
of a unit are moved into the store when they are complete, then a file in `units/` notes it; a
preparation that continues skips these units. When all units are done, `manifest.json` makes the
folder a token store. `plan.json` stays, for damaged shards to be written again.
"""

import contextlib
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.data import SPLITS
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.data.token_store import (
    PLAN_FILE,
    SplitWriter,
    file_sha256,
    read_manifest,
    write_manifest,
)
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer
from aoe_jax.data.workers import Workers
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.json_files import read_json, replace_durably, write_json
from aoe_jax.locking import alone_in

logger = logging.getLogger(__name__)

_UNITS = 512  # the number of units of work to aim at, within
_UNIT_BYTES = (2**22, 2**29)  # the smallest and largest size of a unit
_TRAINING_BYTES = 2**26  # text that byte-level BPE is trained on


@dataclass(frozen=True)
class Settings:
    """Settings that the tokens depend on.

    Attributes:
        tokenizer: the path of a tokenizer's file, or `bpe:N`, byte-level BPE of N tokens trained on
            a sample.
        text_field: the field or column of JSON lines and Parquet that holds the text.
        validation: the share of documents for validation. A hash of its text decides on the split
            of a document, so that copies of a document are in one split.
        test: the share of documents for test.
    """

    tokenizer: str
    text_field: str = "text"
    validation: float = 0.005
    test: float = 0.005

    def __post_init__(self):
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 0.5:
                raise UserError(
                    f"--{name}={value}: must be a share of the documents, above 0 and below 0.5"
                )
        size = self.bpe_size
        if size is not None and not (size.isdecimal() and 256 < int(size) < 2**31):
            raise UserError(
                f"--tokenizer={self.tokenizer!r}: give bpe:N, N tokens, at least 257; or a "
                "tokenizer's file"
            )

    @property
    def bpe_size(self) -> str | None:
        """N as a text, if `tokenizer` is `bpe:N`."""
        made = self.tokenizer.startswith("bpe:")
        return self.tokenizer.removeprefix("bpe:") if made else None

    def split_of(self, digest: bytes) -> str:
        """The split of a document whose text has this hash."""
        chance = int.from_bytes(digest[:8], "big") / 2**64
        if chance < self.validation:
            return "validation"
        return "test" if chance < self.validation + self.test else "train"

    def as_planned(self) -> dict:
        """The settings as `plan.json` has them, with the hash of a tokenizer for its path."""
        planned = dataclasses.asdict(self)
        if self.bpe_size is None:
            planned["tokenizer"] = load_tokenizer(self.tokenizer, setting="--tokenizer").sha256
        return planned


def prepare(inputs: Sequence[str], settings: Settings, output: Path, processes: int):
    """Make a token store in `output`, or continue one that the same call began.

    Args:
        inputs: glob patterns, see `documents.find_files`.
        settings: see `Settings`.
        output: a directory that is empty, new, or of the same preparation.
        processes: number of processes that tokenise; the store doesn't depend on it.

    Raises:
        UserError: an input or the tokenizer can't be used, `output` belongs to another preparation,
            the disk is full, or a split would be empty.
    """
    wanted, files = settings.as_planned(), find_files(inputs, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={output}: can't be made ({error.strerror}); name a directory"
        ) from error
    with alone_in(output, "output"), _full_disk_is_named(output):
        plan = _claim(files, settings, wanted, output)
        if _is_complete(output):
            shutil.rmtree(output / "units", ignore_errors=True)
            logger.info(f"{output} is complete already; --check reads it whole")
            return
        tokenizer, n_units = install_tokenizer(output, plan, settings), len(plan["units"])
        missing = [unit for unit in range(n_units) if not _is_done(output, unit)]
        if len(missing) < n_units:
            done = n_units - len(missing)
            logger.info(f"going on: {done} of {n_units} units of work are done")
        started = time.monotonic()
        _write_units(output, plan, processes, missing)
        seconds = time.monotonic() - started
        results = [read_json(_done_file(output, unit)) for unit in range(n_units)]
        _finish(output, settings, tokenizer, results)
        written = [split["bytes"] for unit in missing for split in results[unit]["splits"].values()]
        rate = sum(written) / seconds / 1e6
        logger.info(
            f"{rate:.1f} MB of text a second, {rate / processes:.1f} for each of {processes} "
            "processes"
        )
        logger.info(
            f"wrote {output}; train on it with --config.data.name=prepared "
            f"--config.data.path={output.absolute()}"
        )


def _finish(output: Path, settings: Settings, tokenizer: Tokenizer, results: list[dict]):
    """Write the manifest, from the results of all units."""
    splits = {split: _sum([result["splits"][split] for result in results]) for split in SPLITS}
    _refuse_empty(splits, settings, output)
    hashes = "".join(result["fingerprint"] for result in results)
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
    write_manifest(output, Path(os.path.abspath(output)).name, fingerprint, tokenizer, splits)
    shutil.rmtree(output / "units")
    if n_empty := sum(result["empty"] for result in results):
        logger.warning(f"left out {n_empty} documents without text")
    for name, split in splits.items():
        logger.info(
            f"{name}: {split['documents']} documents, {split['tokens']} tokens, "
            f"{split['bytes']} bytes of text, {len(split['shards'])} shards"
        )


def check(output: Path) -> list[str]:
    """The names of the damaged or missing shards of a complete store.

    Raises:
        UserError: the store is incomplete, or its manifest or its tokenizer is damaged.
    """
    manifest, file = read_manifest(output), saved_tokenizer(output)
    if load_tokenizer(file, setting="tokenizer").sha256 != manifest["tokenizer_sha256"]:
        raise UserError(f"{file} isn't the tokenizer of this store; put that back")
    wanted, damaged = _sha256_of_shards(manifest), []
    for name in tqdm(wanted, desc=f"checking {output.name}", unit="shard", delay=1):
        try:
            intact = file_sha256(output / name) == wanted[name]
        except OSError:
            intact = False
        if not intact:
            damaged.append(name)
    return damaged


def repair(output: Path, processes: int) -> list[str]:
    """Write the damaged shards of a complete store again, from its input; returns their names.

    Raises:
        UserError: see `check`; or the input is missing or has changed.
    """
    if not (output / PLAN_FILE).exists():
        raise UserError(
            f"--output={output}: has no {PLAN_FILE}, so it can't be repaired; prepare it again"
        )
    with alone_in(output, "output"), _full_disk_is_named(output):
        damaged = check(output)
        if damaged:
            plan = read_json(output / PLAN_FILE, "prepare it again, in another folder")
            units = sorted({int(name.split("-")[1]) for name in damaged})
            _write_units(output, plan, processes, units, _sha256_of_shards(read_manifest(output)))
            shutil.rmtree(output / "units")
    return damaged


def make_plan(files: Sequence[Path], settings: Settings) -> dict:
    """The content of `plan.json`, from which the store follows: the settings, the `files` with
    their states, and the `units`, lists of pieces `[number of the file, start, stop]`.
    """
    states = [_state(str(file)) for file in files]
    smallest, largest = _UNIT_BYTES
    unit_bytes = min(max(sum(size for _, size, _ in states) // _UNITS, smallest), largest)
    units, pieces, total = [], [], 0
    with ThreadPoolExecutor() as pool:  # reads the metadata of Parquet files
        for number, parts in enumerate(pool.map(lambda file: pieces_of(file, unit_bytes), files)):
            for piece, size in parts:
                pieces.append([number, piece.start, piece.stop])
                total += size
                if total >= unit_bytes:
                    units.append({"size": total, "pieces": pieces})
                    pieces, total = [], 0
    if pieces:
        units.append({"size": total, "pieces": pieces})
    return settings.as_planned() | {"files": [list(state) for state in states], "units": units}


def _pieces(plan: dict, unit: int) -> list[Piece]:
    files = plan["files"]
    return [Piece(files[n][0], start, stop) for n, start, stop in plan["units"][unit]["pieces"]]


def _settings(plan: dict) -> Settings:
    return Settings(**{field.name: plan[field.name] for field in dataclasses.fields(Settings)})


def _state(path: str) -> tuple[str, int, int] | None:
    """Path, size and time of modification of a file; None if it doesn't exist."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return path, stat.st_size, stat.st_mtime_ns


def _claim(files: Sequence[Path], settings: Settings, wanted: dict, output: Path) -> dict:
    """The plan of `output`, made if there is none; refuses one of other settings or files."""
    if not (output / PLAN_FILE).exists():
        if any(path.name != f"{PLAN_FILE}.partial" for path in output.iterdir()):
            raise UserError(
                f"--output={output}: is not empty, and holds no preparation; use another --output"
            )
        write_json(output / PLAN_FILE, make_plan(files, settings), indent=None)
    plan = read_json(output / PLAN_FILE, "delete the folder, or use another --output")
    advice = "Delete the folder, or use another --output"
    for name, here in wanted.items():
        there = plan.get(name)
        if there != here:
            raise UserError(
                f"--output={output}: holds a preparation of something else: {name} is {there!r} "
                f"there, {here!r} here. {advice}"
            )
    planned, found = {path for path, _, _ in plan["files"]}, {str(file) for file in files}
    for path in sorted(planned - found):
        raise UserError(
            f"--output={output}: holds a preparation of more: {path} is gone, or not named here. "
            f"{advice}"
        )
    for state in plan["files"]:
        _refuse_changed(state, advice)
    if new := sorted(found - planned):
        logger.warning(
            f"{len(new)} new files, such as {new[0]}, are not in this preparation, which is older"
        )
    return plan


def _refuse_changed(state: Sequence, advice: str):
    if _state(state[0]) != tuple(state):
        raise UserError(f"--input: {state[0]} has changed since the preparation began. {advice}")


def _is_complete(output: Path) -> bool:
    try:
        read_manifest(output)
    except UserError:  # missing, or half written before a power cut
        return False
    return True


@contextlib.contextmanager
def _full_disk_is_named(output: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # array_record raises RuntimeError, tokenizers bare Exception
        if not is_disk_full(error):
            raise
        raise UserError(
            f"--output={output}: the disk is full; free some space, and the same command goes on "
            "where it was"
        ) from error


def install_tokenizer(output: Path, plan: dict, settings: Settings) -> Tokenizer:
    """The tokenizer in `output`; if it is missing, it is trained or copied there first."""
    partial = output / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if saved_tokenizer(output).exists():
        return load_tokenizer(saved_tokenizer(output), setting="tokenizer")
    if settings.bpe_size is None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        logger.info("training a tokenizer on a sample of the text")
        tokenizer = train_tokenizer(_sample(plan), int(settings.bpe_size))
    partial.mkdir()
    tokenizer.save(partial)
    replace_durably(partial / tokenizer.file_name, output / tokenizer.file_name)
    partial.rmdir()
    return tokenizer


def _sample(plan: dict) -> Iterator[str]:
    """Training documents from the beginning of each unit of work."""
    for unit in range(len(plan["units"])):
        left = _TRAINING_BYTES // len(plan["units"])
        for text, split, _ in _split_documents(_pieces(plan, unit), _settings(plan)):
            if split == "train":
                yield text
                left -= len(text)
            if left <= 0:
                break


def _write_units(
    output: Path,
    plan: dict,
    processes: int,
    units: list[int],
    expected: dict[str, str] | None = None,
):
    """Write the shards of these units of work; `expected` is as in `UnitWriter`."""
    (output / "units").mkdir(exist_ok=True)
    for killed in (output / "units").glob("*.partial-*"):
        shutil.rmtree(killed, ignore_errors=True)
    sizes = [unit["size"] for unit in plan["units"]]
    total, done = sum(sizes), sum(sizes) - sum(sizes[unit] for unit in units)
    # Bytes that the processes have read of each unit.
    read = multiprocessing.get_context("spawn").Array("q", len(sizes), lock=False)
    bar = tqdm(
        desc="preparing", total=total, initial=done, unit="B", unit_scale=True, mininterval=1
    )
    workers = Workers(processes, UnitWriter, (output, plan, read, expected))

    def name(unit: int):
        return f"{_pieces(plan, unit)[0].path} (unit {unit})"

    def warn(message: str):
        with logging_redirect_tqdm([logger]):
            logger.warning(message)

    with bar, workers:
        for _ in workers.run(units, name, warn):
            bar.update(min(done + sum(read), total) - bar.n)


class UnitWriter:
    """Writes the shards of units of work, in a worker process."""

    def __init__(
        self,
        output: Path,
        plan: dict,
        read: MutableSequence[int],
        expected: dict[str, str] | None = None,
    ):
        """Load the tokenizer.

        Args:
            output: the store.
            plan: its plan.
            read: receives the number of bytes read of each unit.
            expected: in a repair, hashes of all shards by name; a unit whose shards would differ is
                refused.
        """
        self._output, self._plan, self._read, self._expected = output, plan, read, expected
        self._settings = _settings(plan)
        self._tokenizer = load_tokenizer(saved_tokenizer(output), threads=1)

    def __call__(self, unit: int):
        """Write the shards of a unit, then the file that notes it."""
        partial = self._output / "units" / f"{unit:05d}.partial-{os.getpid()}"
        try:
            with _full_disk_is_named(self._output):
                partial.mkdir()
                result = self._write(unit, partial)
                shards = _sha256_of_shards(result)
                self._refuse_other_input(unit, shards)
                for shard in shards:
                    os.replace(partial / shard, self._output / shard)
                write_json(_done_file(self._output, unit), result)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _refuse_other_input(self, unit: int, shards: dict[str, str]):
        pieces = self._plan["units"][unit]["pieces"]
        states = [self._plan["files"][file] for file in sorted({file for file, _, _ in pieces})]
        if self._expected is None:
            for state in states:
                _refuse_changed(state, f"Delete {self._output}, and prepare it again")
        elif not shards.items() <= self._expected.items():
            raise UserError(f"{states[0][0]}: the input has changed since; prepare it again")

    def _write(self, unit: int, folder: Path) -> dict:
        digest, empty = hashlib.sha256(), 0

        def count(read: int):
            self._read[unit] = read

        with contextlib.ExitStack() as held:
            writers = {}
            for split in SPLITS:
                writer = SplitWriter(folder, f"{split}-{unit:05d}", self._tokenizer)
                writers[split] = held.enter_context(writer)
            pieces = _pieces(self._plan, unit)
            for text, split, text_digest in _split_documents(pieces, self._settings, count):
                if text:
                    writers[split].add(text)
                    digest.update(text_digest)
                empty += not text
            splits = {split: writer.finish() for split, writer in writers.items()}
        return {"splits": splits, "fingerprint": digest.hexdigest(), "empty": empty}


def _split_documents(
    pieces: Sequence[Piece], settings: Settings, progress: Callable[[int], None] = lambda read: None
) -> Iterator[tuple[str, str, bytes]]:
    """Yield `(text, split, hash of the text)` of each document; `progress` receives the number of
    bytes read of all pieces.
    """
    before = 0
    for piece in pieces:
        last = 0

        def count(read: int):
            nonlocal last
            last = read
            progress(before + read)

        for text in documents(piece, settings.text_field, count):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            yield text, settings.split_of(digest), digest
        before += last


def _done_file(output: Path, unit: int) -> Path:
    return output / "units" / f"{unit:05d}.json"


def _is_done(output: Path, unit: int) -> bool:
    # After a power cut, shards may be missing although they were noted.
    try:
        result = read_json(_done_file(output, unit))
    except UserError:
        return False
    return all((output / shard).is_file() for shard in _sha256_of_shards(result))


def _sha256_of_shards(result: dict) -> dict[str, str]:
    """The hash of each shard by its name, from the result of a unit or a manifest."""
    return {
        shard["name"]: shard["sha256"]
        for split in result["splits"].values()
        for shard in split["shards"]
    }


def _sum(parts: list[dict]) -> dict:
    """The numbers and shards of a split from those of its units."""
    numbers = {name: sum(part[name] for part in parts) for name in ("tokens", "documents", "bytes")}
    return numbers | {"shards": [shard for part in parts for shard in part["shards"]]}


def _refuse_empty(splits: dict[str, dict], settings: Settings, output: Path):
    n_documents = sum(split["documents"] for split in splits.values())
    for name, split in splits.items():
        if split["documents"] == 0:
            share, larger = "", "smaller shares of the other splits"
            if name != "train":
                share, larger = f"--{name}={getattr(settings, name)}: ", "a larger share"
            raise UserError(
                f"{share}the {name} split got none of {n_documents} documents; delete {output}, "
                f"and prepare it with {larger} or more documents"
            )

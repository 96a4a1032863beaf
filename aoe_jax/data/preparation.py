"""Making a token store of files of any size: in parallel, and so that a kill loses little and
changes nothing.

The documents of the input are cut into units of work, whatever the number of processes. A unit's
shards come into being complete, then a file in `units/` says so; a preparation that goes on leaves
out what is done. When all is, `manifest.json` makes it a token store. `plan.json` stays beside it,
by which a damaged shard can be written again.
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
from typing import NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.data import SPLITS
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.data.manifest import PLAN_FILE, read_manifest, write_manifest
from aoe_jax.data.store_writer import SplitWriter
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer
from aoe_jax.data.workers import Workers
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.json_files import read_json, replace_durably, write_json
from aoe_jax.locking import alone_in

logger = logging.getLogger(__name__)

_UNITS = 512  # about so many, unless they would be smaller or larger than
_UNIT_BYTES = (2**22, 2**29)
_TRAINING_BYTES = 2**26  # of text that byte-level BPE is trained on


@dataclass(frozen=True)
class Settings:
    """What the tokens depend on beside the files.

    Attributes:
        tokenizer: the path of a tokenizer's file, or `bpe:N`, byte-level BPE of N tokens trained on
          a sample.
        text_field: the field or column of JSON lines and Parquet that holds the text.
        validation: share of the documents that are for validation; they are told by a hash of their
            text, so that a document that comes twice is in one split.
        test: the same for test.
    """

    tokenizer: str
    text_field: str = "text"
    validation: float = 0.005
    test: float = 0.005

    def __post_init__(self):
        """Raise `UserError` for a share that can't be."""
        for name in ("validation", "test"):
            value = getattr(self, name)
            if not 0 < value < 0.5:
                raise UserError(
                    f"--{name}={value}: must be a share of the documents, above 0 and below 0.5"
                )
        size = self.tokenizer.removeprefix("bpe:")
        if self.tokenizer.startswith("bpe:") and not (size.isdecimal() and 256 < int(size) < 2**31):
            raise UserError(
                f"--tokenizer={self.tokenizer!r}: give bpe:N, N tokens, at least 257; or a tokenizer's file"
            )

    def split_of(self, digest: bytes) -> str:
        """The split of a document with this hash."""
        chance = int.from_bytes(digest[:8], "big") / 2**64
        if chance < self.validation:
            return "validation"
        return "test" if chance < self.validation + self.test else "train"


class Unit(NamedTuple):
    """A unit of work: its number, the input in it, and how the files were when it was planned."""

    number: int
    pieces: tuple[Piece, ...]
    files: tuple[tuple[str, int, int], ...]  # path, bytes and time of change


def prepare(inputs: Sequence[str], settings: Settings, output: Path, processes: int):
    """Make a token store in `output`, or go on with one that was begun by the same call.

    Args:
        inputs: glob patterns, as in `documents.find_files`.
        settings: see there.
        output: a directory that is empty, not there yet, or of the same preparation.
        processes: that tokenise, one core each. The store is the same whatever their number.

    Raises:
        UserError: an input or the tokenizer can't be used, `output` is of another preparation, the
            disk is full, or a split came out empty.
    """
    wanted, files = _as_planned(settings), find_files(inputs, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={output}: can't be made ({error.strerror}); name a directory"
        ) from error
    with alone_in(output, "output"), _no_room_means(output):
        plan = _claim(files, settings, wanted, output)
        if _is_complete(output):
            shutil.rmtree(output / "units", ignore_errors=True)
            logger.info("%s is complete already; --check reads it whole", output)
            return
        tokenizer = install_tokenizer(output, plan, settings)
        done = {unit for unit in range(len(plan["units"])) if _is_done(output, unit)}
        if done:
            logger.info("going on: %d of %d units of work are done", len(done), len(plan["units"]))
        started = time.monotonic()
        _write_units(
            output,
            plan,
            processes,
            [unit for unit in range(len(plan["units"])) if unit not in done],
        )
        seconds = time.monotonic() - started
        results = [read_json(_done_file(output, unit)) for unit in range(len(plan["units"]))]
        splits = {split: _sum([result["splits"][split] for result in results]) for split in SPLITS}
        _refuse_empty(splits, settings, output)
        fingerprint = hashlib.sha256(
            "".join(result["fingerprint"] for result in results).encode()
        ).hexdigest()
        write_manifest(output, Path(os.path.abspath(output)).name, fingerprint, tokenizer, splits)
        shutil.rmtree(output / "units")
        written = [result for unit, result in enumerate(results) if unit not in done]
        _report(output, splits, results, _text_bytes(written) / seconds, processes)


def check(output: Path) -> list[str]:
    """The names of the shards of a complete store that are missing or not as they were written.

    Raises:
        UserError: there is no complete store, or its manifest or its tokenizer is damaged.
    """
    manifest = read_manifest(output)
    if (
        load_tokenizer(saved_tokenizer(output), setting="tokenizer").sha256
        != manifest["tokenizer_sha256"]
    ):
        raise UserError(
            f"{saved_tokenizer(output)} isn't the tokenizer of this store; put that back"
        )
    shards = tqdm(
        _sha256_of_shards(manifest).items(), desc=f"checking {output.name}", unit="shard", delay=1
    )
    return [name for name, sha256 in shards if _sha256(output / name) != sha256]


def repair(output: Path, processes: int) -> list[str]:
    """Write the damaged shards of a complete store again, from the files that it was made from;
    their names.

    Raises:
        UserError: as in `check`; or the input isn't there any more, or has changed.
    """
    if not (output / PLAN_FILE).exists():
        raise UserError(
            f"--output={output}: has no {PLAN_FILE}, so it can't be repaired; prepare it again"
        )
    with alone_in(output, "output"), _no_room_means(output):
        damaged = check(output)
        if damaged:
            plan = read_json(output / PLAN_FILE, "prepare it again, in another folder")
            units = sorted({int(name.split("-")[1]) for name in damaged})
            _write_units(output, plan, processes, units, _sha256_of_shards(read_manifest(output)))
            shutil.rmtree(output / "units")
    return damaged


def make_plan(files: Sequence[Path], settings: Settings) -> dict:
    """All that the store follows from, ready for JSON; units of work are lists of pieces, their
    files as numbers.
    """
    states = [_state(str(file)) for file in files]
    smallest, largest = _UNIT_BYTES
    unit_bytes = min(max(sum(size for _, size, _ in states) // _UNITS, smallest), largest)
    units, pieces, total = [], [], 0
    with ThreadPoolExecutor() as pool:  # the pieces of Parquet are in the files
        for number, parts in enumerate(pool.map(lambda file: pieces_of(file, unit_bytes), files)):
            for piece, size in parts:
                pieces.append([number, piece.start, piece.stop])
                total += size
                if total >= unit_bytes:
                    units.append({"size": total, "pieces": pieces})
                    pieces, total = [], 0
    if pieces:
        units.append({"size": total, "pieces": pieces})
    return _as_planned(settings) | {"files": [list(state) for state in states], "units": units}


def unit_of(plan: dict, number: int) -> Unit:
    """A unit of work of a plan."""
    pieces = [
        Piece(plan["files"][file][0], start, stop)
        for file, start, stop in plan["units"][number]["pieces"]
    ]
    files = sorted({file for file, _, _ in plan["units"][number]["pieces"]})
    return Unit(number, tuple(pieces), tuple(tuple(plan["files"][file]) for file in files))


def _as_planned(settings: Settings) -> dict:
    made = settings.tokenizer.startswith("bpe:")
    tokenizer = (
        settings.tokenizer
        if made
        else load_tokenizer(settings.tokenizer, setting="--tokenizer").sha256
    )
    return dataclasses.asdict(settings) | {"tokenizer": tokenizer}


def _state(path: str) -> tuple[str, int, int] | None:
    """A file as it is now: what changes when it does; None if it isn't there."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return path, stat.st_size, stat.st_mtime_ns


def _claim(files: Sequence[Path], settings: Settings, wanted: dict, output: Path) -> dict:
    """The plan of `output`, which is made unless it is there; refuses one that isn't as `wanted`,
    or of changed files.
    """
    if not (output / PLAN_FILE).exists():
        if any(path.name != f"{PLAN_FILE}.partial" for path in output.iterdir()):
            raise UserError(
                f"--output={output}: is not empty, and holds no preparation; use another --output"
            )
        write_json(output / PLAN_FILE, make_plan(files, settings), indent=None)
    plan = read_json(output / PLAN_FILE, "delete the folder, or use another --output")
    advice = "Delete the folder, or use another --output"
    for name, here in wanted.items():
        if plan.get(name) != here:
            there = plan.get(name)
            raise UserError(
                f"--output={output}: holds a preparation of something else: {name} is {there!r} there, {here!r} here. "
                f"{advice}"
            )
    planned, found = {path for path, _, _ in plan["files"]}, {str(file) for file in files}
    for path in sorted(planned - found):
        raise UserError(
            f"--output={output}: holds a preparation of more: {path} is gone, or not named here. {advice}"
        )
    for state in plan["files"]:
        _refuse_changed(state, advice)
    if new := sorted(found - planned):
        logger.warning(
            "%s and %d other files are new since, and not in this store", new[0], len(new) - 1
        )
    return plan


def _refuse_changed(state: Sequence, advice: str):
    if _state(state[0]) != tuple(state):
        raise UserError(f"--input: {state[0]} has changed since the preparation began. {advice}")


def _is_complete(output: Path) -> bool:
    try:
        read_manifest(output)
    except UserError:  # it isn't there, or half there after a power cut
        return False
    return True


@contextlib.contextmanager
def _no_room_means(output: Path) -> Iterator[None]:
    """A full disk is a user's matter."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # array_record raises RuntimeError, tokenizers bare Exception
        if not is_disk_full(error):
            raise
        raise UserError(
            f"--output={output}: the disk is full; make room, and the same command goes on where it was"
        ) from error


def install_tokenizer(output: Path, plan: dict, settings: Settings) -> Tokenizer:
    """The tokenizer, after training or loading it and putting it into `output` if it isn't there."""
    partial = output / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if saved_tokenizer(output).exists():
        return load_tokenizer(saved_tokenizer(output), setting="tokenizer")
    if settings.tokenizer.startswith("bpe:"):
        logger.info("training a tokenizer on a sample of the text")
        tokenizer = train_tokenizer(
            _sample(plan, settings), int(settings.tokenizer.removeprefix("bpe:"))
        )
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    partial.mkdir()
    tokenizer.save(partial)
    replace_durably(partial / tokenizer.file_name, output / tokenizer.file_name)
    partial.rmdir()
    return tokenizer


def _sample(plan: dict, settings: Settings) -> Iterator[str]:
    """Training documents, as many from the beginning of each unit of work."""
    for number in range(len(plan["units"])):
        left = _TRAINING_BYTES // len(plan["units"])
        for text, split, _ in _split_documents(unit_of(plan, number).pieces, settings):
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
    """Write the shards of these units of work, with a progress bar over the input.

    With `expected`, the hashes of all shards by name, a unit that comes out otherwise is refused,
    and what was there stays.
    """
    settings = Settings(**{field.name: plan[field.name] for field in dataclasses.fields(Settings)})
    (output / "units").mkdir(exist_ok=True)
    for killed in (output / "units").glob("*.partial-*"):
        shutil.rmtree(killed, ignore_errors=True)
    read = multiprocessing.get_context("spawn").Array(
        "q", len(plan["units"]), lock=False
    )  # bytes read of each unit
    sizes = [unit["size"] for unit in plan["units"]]
    done = sum(sizes) - sum(sizes[unit] for unit in units)
    with (
        tqdm(
            desc="preparing",
            total=sum(sizes),
            initial=done,
            unit="B",
            unit_scale=True,
            mininterval=1,
        ) as bar,
        Workers(processes, UnitWriter, (output, settings, read, expected)) as workers,
    ):

        def warn(message: str):
            with logging_redirect_tqdm([logger]):
                logger.warning(message)

        tasks = [unit_of(plan, unit) for unit in units]
        for _ in workers.run(
            tasks, lambda unit: f"{unit.pieces[0].path} (unit {unit.number})", warn
        ):
            bar.update(min(done + sum(read), sum(sizes)) - bar.n)


class UnitWriter:
    """What a worker process does: write the shards of one unit of work after the other."""

    def __init__(
        self,
        output: Path,
        settings: Settings,
        read: MutableSequence[int],
        expected: dict[str, str] | None,
    ):
        """Load the tokenizer; `read` is told how many bytes of each unit have been read; `expected`
        as in `_write_units`.
        """
        self._output, self._settings, self._read, self._expected = output, settings, read, expected
        self._tokenizer = load_tokenizer(saved_tokenizer(output), threads=1)

    def __call__(self, unit: Unit):
        """Write the shards of a unit, then the file that says so."""
        partial = self._output / "units" / f"{unit.number:05d}.partial-{os.getpid()}"
        try:
            with _no_room_means(self._output):
                partial.mkdir()
                result = self._write(unit, partial)
                shards = _sha256_of_shards(result)
                self._refuse_other_input(unit, shards)
                for shard in shards:
                    os.replace(partial / shard, self._output / shard)
                write_json(_done_file(self._output, unit.number), result)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _refuse_other_input(self, unit: Unit, shards: dict[str, str]):
        """Of a store that is repaired the shards tell, and it doesn't matter when a file was
        written.
        """
        if self._expected is None:
            for state in unit.files:
                _refuse_changed(state, f"Delete {self._output}, and prepare it again")
        elif not shards.items() <= self._expected.items():
            raise UserError(f"{unit.pieces[0].path}: the input has changed since; prepare it again")

    def _write(self, unit: Unit, folder: Path) -> dict:
        """The numbers of a unit; its shards are in `folder` then."""
        digest, empty = hashlib.sha256(), 0

        def count(read: int):
            self._read[unit.number] = read

        with contextlib.ExitStack() as held:
            writers = {
                split: held.enter_context(
                    SplitWriter(folder, f"{split}-{unit.number:05d}", self._tokenizer)
                )
                for split in SPLITS
            }
            for text, split, text_digest in _split_documents(unit.pieces, self._settings, count):
                if text:
                    writers[split].add(text)
                    digest.update(text_digest)
                empty += not text
            splits = {split: writer.finish() for split, writer in writers.items()}
        return {"splits": splits, "fingerprint": digest.hexdigest(), "empty": empty}


def _split_documents(
    pieces: Sequence[Piece], settings: Settings, progress: Callable[[int], None] = lambda read: None
) -> Iterator[tuple[str, str, bytes]]:
    """The documents of pieces: `(text, split, hash of the text)`; `progress` is told how much of
    all has been read.
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
    """Whether a unit's shards are all there; not if the power went while they were written."""
    try:
        result = read_json(_done_file(output, unit))
    except UserError:
        return False
    return all((output / shard).is_file() for shard in _sha256_of_shards(result))


def _sha256_of_shards(result: dict) -> dict[str, str]:
    """The hash of each shard by its name, of a unit of work or of a manifest."""
    return {
        shard["name"]: shard["sha256"]
        for split in result["splits"].values()
        for shard in split["shards"]
    }


def _sum(parts: list[dict]) -> dict:
    """One split of all units, its shards in the order of the documents."""
    numbers = {name: sum(part[name] for part in parts) for name in ("tokens", "documents", "bytes")}
    return numbers | {"shards": [shard for part in parts for shard in part["shards"]]}


def _text_bytes(results: list[dict]) -> int:
    return sum(split["bytes"] for result in results for split in result["splits"].values())


def _refuse_empty(splits: dict[str, dict], settings: Settings, output: Path):
    documents = sum(split["documents"] for split in splits.values())
    for name, split in splits.items():
        if split["documents"] == 0:
            share = "" if name == "train" else f"--{name}={getattr(settings, name)}: "
            raise UserError(
                f"{share}none of {documents} documents fell to {name}; delete {output}, and prepare it with a larger share "
                "or more documents"
            )


def _report(
    output: Path, splits: dict[str, dict], results: list[dict], rate: float, processes: int
):
    empty = sum(result["empty"] for result in results)
    if empty:
        logger.warning("left out %d documents without text", empty)
    for name, split in splits.items():
        logger.info(
            "%s: %d documents, %d tokens, %d bytes of text, %d shards",
            *(name, split["documents"], split["tokens"], split["bytes"], len(split["shards"])),
        )
    logger.info(
        "%.1f MB of text a second, %.1f for each of %d processes",
        rate / 1e6,
        rate / 1e6 / processes,
        processes,
    )
    logger.info(
        "wrote %s; train on it with --config.data.name=prepared --config.data.path=%s",
        output,
        output.absolute(),
    )


def _sha256(path: Path) -> str | None:
    """Of a file; None if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None

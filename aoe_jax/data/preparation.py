"""Making a token store of files of any size: in parallel, and so that a kill loses little and changes nothing.

The documents of the input are cut into units of work, whatever the number of processes. A unit's shards come into being
complete, then a file in `units/` says so; a preparation that goes on leaves out what is done. When all is, `manifest.json`
makes it a token store. `plan.json` stays beside it, by which a damaged shard can be written again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aoe_jax.data import SPLITS
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.data.manifest import PLAN_FILE, read_manifest, write_manifest
from aoe_jax.data.store_writer import SplitWriter
from aoe_jax.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer
from aoe_jax.data.workers import Workers
from aoe_jax.errors import UserError, is_disk_full
from aoe_jax.json_files import read_json, write_json
from aoe_jax.locking import alone_in

logger = logging.getLogger(__name__)

_UNITS = 512  # about so many, unless they would be smaller or larger than
_UNIT_BYTES = (2**22, 2**29)
_TRAINING_BYTES = 2**26  # of text that byte-level BPE is trained on


@dataclass(frozen=True)
class Settings:
    """What the tokens depend on beside the files.

    Attributes:
        tokenizer: the path of a tokenizer's file, or `bpe:N`, byte-level BPE of N tokens trained on a sample.
        text_field: the field or column of JSON lines and Parquet that holds the text.
        validation: share of the documents that are for validation; they are told by a hash of their text, so that a
            document that comes twice is in one split.
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
                raise UserError(f"--{name}={value}: must be a share of the documents, above 0 and below 0.5")
        size = self.tokenizer.removeprefix("bpe:")
        if self.tokenizer.startswith("bpe:") and not (size.isdecimal() and int(size) > 256):
            raise UserError(
                f"--tokenizer={self.tokenizer!r}: give bpe:N, N tokens, at least 257; or a tokenizer's file"
            )

    def split_of(self, digest: bytes) -> str:
        """The split of a document with this hash."""
        chance = int.from_bytes(digest[:8], "big") / 2**64
        if chance < self.validation:
            return "validation"
        return "test" if chance < self.validation + self.test else "train"


def prepare(inputs: Sequence[str], settings: Settings, output: Path, processes: int):
    """Make a token store in `output`, or go on with one that was begun by the same call.

    Args:
        inputs: glob patterns, as in `documents.find_files`.
        settings: see there.
        output: a directory that is empty, not there yet, or of the same preparation.
        processes: that tokenise, one core each. The store is the same whatever their number.

    Raises:
        UserError: an input or the tokenizer can't be used, `output` is of another preparation, or a split came out empty.
    """
    plan = make_plan(inputs, settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: can't be made ({error.strerror}); name a directory") from error
    with alone_in(output, "output"):
        _claim(output, plan)
        if (output / "manifest.json").exists():
            shutil.rmtree(output / "units", ignore_errors=True)
            logger.info("%s is complete already; --check reads it whole", output)
            return
        tokenizer = install_tokenizer(output, plan, settings)
        (output / "units").mkdir(exist_ok=True)
        for killed in (output / "units").glob("*.partial-*"):
            shutil.rmtree(killed, ignore_errors=True)
        done = {unit for unit in range(len(plan["units"])) if _is_done(output, unit)}
        if done:
            logger.info("going on: %d of %d units of work are done", len(done), len(plan["units"]))
        started = time.monotonic()
        _write_units(output, plan, processes, [unit for unit in range(len(plan["units"])) if unit not in done])
        seconds = time.monotonic() - started
        if (now := _inputs(find_files(inputs))) != plan["inputs"]:
            changed = _changed_input(plan, {"inputs": now})
            raise UserError(f"--input: {changed} has changed meanwhile; delete {output}, and prepare it again")
        results = [read_json(_done_file(output, unit)) for unit in range(len(plan["units"]))]
        splits = {split: _sum([result["splits"][split] for result in results]) for split in SPLITS}
        _refuse_empty(splits, settings, output)
        fingerprint = hashlib.sha256("".join(result["fingerprint"] for result in results).encode()).hexdigest()
        write_manifest(output, output.name, fingerprint, tokenizer, splits)
        shutil.rmtree(output / "units")
        written = [result for unit, result in enumerate(results) if unit not in done]
        _report(output, splits, results, _text_bytes(written) / seconds, processes)


def check(output: Path) -> list[str]:
    """The names of the shards of a complete store that are missing or not as they were written.

    Raises:
        UserError: there is no complete store, or its manifest or its tokenizer is damaged.
    """
    manifest = read_manifest(output)
    if load_tokenizer(saved_tokenizer(output)).sha256 != manifest["tokenizer_sha256"]:
        raise UserError(f"{saved_tokenizer(output)} isn't the tokenizer of this store; put that back")
    shards = tqdm(_sha256_of_shards(manifest).items(), desc=f"checking {output.name}", unit="shard", delay=1)
    return [name for name, sha256 in shards if _sha256(output / name) != sha256]


def repair(output: Path, processes: int) -> list[str]:
    """Write the damaged shards of a complete store again, from the files that it was made from; their names.

    Raises:
        UserError: as in `check`; or the input isn't there any more, or has changed.
    """
    if not (output / PLAN_FILE).exists():
        raise UserError(f"--output={output}: has no {PLAN_FILE}, so it can't be repaired; prepare it again")
    with alone_in(output, "output"):
        damaged = check(output)
        if damaged:
            plan = read_json(output / PLAN_FILE, "prepare it again, in another folder")
            units = sorted({int(name.split("-")[1]) for name in damaged})
            (output / "units").mkdir(exist_ok=True)
            _write_units(output, plan, processes, units, _sha256_of_shards(read_manifest(output)))
            shutil.rmtree(output / "units")
    return damaged


def make_plan(inputs: Sequence[str], settings: Settings) -> dict:
    """All that the store follows from, ready for JSON; a unit of work is a list of pieces."""
    files = find_files(inputs)
    listed = _inputs(files)
    smallest, largest = _UNIT_BYTES
    unit_bytes = min(max(sum(file["bytes"] for file in listed) // _UNITS, smallest), largest)
    units, pieces, size = [], [], 0
    for piece, piece_size in itertools.chain.from_iterable(pieces_of(file, unit_bytes) for file in files):
        pieces.append(piece)
        size += piece_size
        if size >= unit_bytes:
            units.append({"size": size, "pieces": pieces})
            pieces, size = [], 0
    if pieces:
        units.append({"size": size, "pieces": pieces})
    made = settings.tokenizer.startswith("bpe:")
    plan = {
        **dataclasses.asdict(settings),
        "tokenizer": settings.tokenizer if made else load_tokenizer(settings.tokenizer, setting="--tokenizer").sha256,
        "inputs": listed,
        "units": units,
    }
    return json.loads(json.dumps(plan))  # lists for tuples, as it will be read again


def _inputs(files: Sequence[Path]) -> list[dict]:
    """What tells whether files are still what they were."""
    stats = ((str(file), file.stat()) for file in files)
    return [{"path": path, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for path, stat in stats]


def _claim(output: Path, plan: dict):
    """Write the plan to `output`, unless it is there; refuse what isn't of this plan."""
    if not (output / PLAN_FILE).exists():
        if any(output.iterdir()):
            raise UserError(f"--output={output}: is not empty, and holds no preparation; use another --output")
        write_json(output / PLAN_FILE, plan)
    there = read_json(output / PLAN_FILE, "delete the folder, or use another --output")
    for name, here in plan.items():
        if there.get(name) != here:
            what = f"{name} is {there.get(name)!r} there, {here!r} here"
            if name in ("inputs", "units"):
                what = f"{_changed_input(there, plan)} is new, gone or changed"
            raise UserError(
                f"--output={output}: holds a preparation of something else: {what}. Delete the folder, or use another "
                "--output"
            )


def _changed_input(plan: dict, other: dict) -> str:
    """The first file that only one of the plans has in this state."""
    files = [{json.dumps(file): file["path"] for file in each["inputs"]} for each in (plan, other)]
    return min((files[0] | files[1])[key] for key in files[0].keys() ^ files[1].keys())


def install_tokenizer(output: Path, plan: dict, settings: Settings) -> Tokenizer:
    """The tokenizer, after training or loading it and putting it into `output` if it isn't there."""
    if saved_tokenizer(output).exists():
        return load_tokenizer(saved_tokenizer(output))
    if settings.tokenizer.startswith("bpe:"):
        logger.info("training a tokenizer on a sample of the text")
        tokenizer = train_tokenizer(_sample(plan, settings), int(settings.tokenizer.removeprefix("bpe:")))
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    partial = output / "tokenizer.partial"
    partial.mkdir(exist_ok=True)
    tokenizer.save(partial)
    os.replace(partial / tokenizer.file_name, output / tokenizer.file_name)
    partial.rmdir()
    return tokenizer


def _sample(plan: dict, settings: Settings) -> Iterator[str]:
    """Training documents, as many from the beginning of each unit of work."""
    for unit in plan["units"]:
        left = _TRAINING_BYTES // len(plan["units"])
        for text, split, _ in _split_documents(unit["pieces"], settings):
            if split == "train":
                yield text
                left -= len(text)
            if left <= 0:
                break


def _write_units(output: Path, plan: dict, processes: int, units: list[int], expected: dict[str, str] | None = None):
    """Write the shards of these units of work, with a progress bar over the input.

    With `expected`, the hashes of all shards by name, a unit that comes out otherwise is refused, and what was there stays.
    """
    settings = Settings(**{field.name: plan[field.name] for field in dataclasses.fields(Settings)})
    read = multiprocessing.get_context("spawn").Array("q", len(plan["units"]), lock=False)  # bytes read of each unit
    sizes = [unit["size"] for unit in plan["units"]]
    done = sum(sizes) - sum(sizes[unit] for unit in units)
    with (
        tqdm(desc="preparing", total=sum(sizes), initial=done, unit="B", unit_scale=True, mininterval=1) as bar,
        Workers(processes, UnitWriter, (output, plan, settings, read, expected)) as workers,
    ):

        def warn(message: str):
            with logging_redirect_tqdm([logger]):
                logger.warning(message)

        for _ in workers.run(units, lambda unit: f"{plan['units'][unit]['pieces'][0][0]} (unit {unit})", warn):
            bar.update(min(done + sum(read), sum(sizes)) - bar.n)


class UnitWriter:
    """What a worker process does: write the shards of one unit of work after the other."""

    def __init__(
        self, output: Path, plan: dict, settings: Settings, read: MutableSequence[int], expected: dict[str, str] | None
    ):
        """Load the tokenizer; `read` is told how many bytes of each unit have been read; `expected` as in `_write_units`."""
        self._output, self._units, self._settings, self._read = output, plan["units"], settings, read
        self._expected = expected
        self._tokenizer = load_tokenizer(saved_tokenizer(output), threads=1)

    def __call__(self, unit: int):
        """Write the shards of a unit, then the file that says so."""
        partial = self._output / "units" / f"{unit:05d}.partial-{os.getpid()}"
        try:
            partial.mkdir()
            result = self._write(unit, partial)
            shards = _sha256_of_shards(result)
            if self._expected and not shards.items() <= self._expected.items():
                raise UserError(f"{self._units[unit]['pieces'][0][0]}: the input has changed since; prepare it again")
            for shard in shards:
                os.replace(partial / shard, self._output / shard)
            write_json(_done_file(self._output, unit), result)
        except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
            if not is_disk_full(error):
                raise
            raise UserError(
                f"--output={self._output}: the disk is full; make room, and the same command goes on where it was"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, unit: int, folder: Path) -> dict:
        """The numbers of a unit; its shards are in `folder` then."""
        digest, empty = hashlib.sha256(), 0
        with contextlib.ExitStack() as held:
            writers = {
                split: held.enter_context(SplitWriter(folder, f"{split}-{unit:05d}", self._tokenizer))
                for split in SPLITS
            }
            for text, split, text_digest in _split_documents(
                self._units[unit]["pieces"], self._settings, self._count(unit)
            ):
                if text:
                    writers[split].add(text)
                    digest.update(text_digest)
                empty += not text
            splits = {split: writer.finish() for split, writer in writers.items()}
        return {"splits": splits, "fingerprint": digest.hexdigest(), "empty": empty}

    def _count(self, unit: int) -> Callable[[int], None]:
        def count(read: int):
            self._read[unit] = read

        return count


def _split_documents(
    pieces: Sequence[Sequence], settings: Settings, progress: Callable[[int], None] = lambda read: None
) -> Iterator[tuple[str, str, bytes]]:
    """The documents of pieces: `(text, split, hash of the text)`; `progress` is told how much of all has been read."""
    before = 0
    for piece in (Piece(*fields) for fields in pieces):
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
    return {shard["name"]: shard["sha256"] for split in result["splits"].values() for shard in split["shards"]}


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


def _report(output: Path, splits: dict[str, dict], results: list[dict], rate: float, processes: int):
    empty = sum(result["empty"] for result in results)
    if empty:
        logger.warning("left out %d documents without text", empty)
    for name, split in splits.items():
        logger.info(
            "%s: %d documents, %d tokens, %d bytes of text, %d shards",
            *(name, split["documents"], split["tokens"], split["bytes"], len(split["shards"])),
        )
    logger.info(
        "%.1f MB of text a second, %.1f for each of %d processes", rate / 1e6, rate / 1e6 / processes, processes
    )
    logger.info(
        "wrote %s; train on it with --config.data.name=prepared --config.data.path=%s", output, output.absolute()
    )


def _sha256(path: Path) -> str | None:
    """Of a file; None if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None

"""Handles paths on a disk, as `pathlib.Path`, and in an object store, as `epath.Path`."""

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import socket
from glob import has_magic
from pathlib import Path

import filelock
import fsspec
from etils import epath
from fsspec.implementations.local import LocalFileSystem

from aoe_jax.errors import UserError
from aoe_jax.storage.retry import patiently

STORES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme of a path -> package for this kind of store
FILE_BYTES = 2**27  # size limit of a tokenizer's file; the largest on the hub have 35 MB

# Commands write these reports into a model's directory. New reports cause no new local copy.
REPORTS = {"eval.json", "load.png", "tasks.json", "text.json", "text.png", "probe.json"}

for _scheme in STORES:  # fsspec's cached listings would miss new files of other hosts
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


def parsed_path(text: str | os.PathLike, name: str, in_store=False, is_pattern=False):
    """Parses a path that a user wrote, such as ~/runs/tiny or gs://BUCKET/runs/tiny.

    With `in_store`, the path may be in an object store. With `is_pattern`, it is a glob pattern.
    Raises `UserError`, whose message begins with `name`, the flag or field of the path, if the path
    is invalid or the package for its store is missing.
    """
    text = str(text)
    if not text.strip():
        raise UserError(f"{name}={text}: is empty; name a path")
    if not is_remote(text) and not re.match(r"\s*[\w+.-]+:/", text):
        return _path_on_disk(text, name)
    known = " or ".join(f"{scheme}://BUCKET/..." for scheme in STORES)
    wanted = f"name a folder, or {known}" if in_store else "it must be on a disk"
    scheme = re.match(rf"({'|'.join(STORES)})://[^/]", text)
    if not in_store or not scheme:
        raise UserError(f"{name}={text}: {wanted}")
    if has_magic(text) and not is_pattern:  # clients of stores would treat it as a pattern
        raise UserError(f"{name}={text}: a path in a store must not have *, ? or [")
    __import__(STORES[scheme[1]])  # a missing package is refused early
    return epath.Path(text)


def _path_on_disk(text, name):
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except RuntimeError as e:
        raise UserError(f"{name}={text}: there is no such home directory; name it in full") from e
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{name}={text}: {e.strerror}; name another path") from e
    return path


def is_remote(path) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def file_system(path):
    """The fsspec file system of a path."""
    scheme, _, rest = os.fspath(path).partition("://")
    return fsspec.filesystem(scheme if rest else "file")


def find(pattern: str) -> dict:
    """Returns `{path: size_and_version, or None for a broken link}` of the files that match a
    pattern of fsspec's `glob`. `**` matches folders of any depth, but does not follow links. Names
    that begin with a dot match only if the pattern has `/.` after its folders without wildcards.
    Raises `OSError`.
    """
    if not is_remote(pattern):
        pattern = os.path.abspath(os.path.expanduser(pattern))
    scheme, _, plain = pattern.rpartition("://")
    known = re.match(r"(([^*?[]|\[[*?[]\])*(?=/))?", plain)[0]  # folders without wildcards
    start = len(re.sub(r"\[(.)\]", r"\1", known))
    is_hidden_named = "/." in plain[len(known) :]
    if is_remote(pattern):
        found = file_system(pattern).glob(pattern, detail=True)
        return {
            epath.Path(f"{scheme}://{name}"): _of_store(file)
            for name, file in found.items()
            if file["type"] == "file" and (is_hidden_named or "/." not in name[start:])
        }
    disk = _Disk()
    names = disk.glob(pattern)
    if disk.errors:
        raise disk.errors[0]
    shown = [Path(name) for name in names if is_hidden_named or "/." not in name[start:]]
    files = [path for path in shown if not path.is_dir()]
    return {path: size_and_version(path) if path.exists() else None for path in files}


class _Disk(LocalFileSystem):
    """Records the errors of folders that cannot be listed; `glob` alone skips such folders."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.errors = []

    def ls(self, path, detail=False, **kwargs):
        try:
            return super().ls(path, detail, **kwargs)
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self.errors.append(e)
            raise


def size_and_version(path) -> tuple[int, int]:
    """`(size in bytes, a number that changes with the content)`. Raises `FileNotFoundError`."""
    if is_remote(path):
        return _of_store(file_system(path).info(os.fspath(path)))
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _of_store(file):
    version = str(file.get("generation") or file["ETag"])
    return file["size"], int(hashlib.sha256(version.encode()).hexdigest()[:15], 16)


def create(path, content: bytes) -> bool:
    """Makes an object in a store and returns True, or returns False if it exists already."""
    try:
        file_system(path).pipe_file(os.fspath(path), content, mode="create")
    except FileExistsError:
        return False
    return True


def unused(path):
    """Returns the first of PATH, PATH-1, PATH-2, ... that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(1)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def move(source, target):
    """Moves a file or folder, also to another disk, and makes the parent folders of `target`. In a
    store, it moves one file after another. Raises `UserError` if one of the parents is a file.
    """
    if is_remote(source):
        file_system(source).mv(os.fspath(source), os.fspath(target), recursive=True)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        what = "cannot be made: it, or a folder above it, is a file; move that away"
        raise UserError(f"{target.parent} {what}") from e
    shutil.move(source, target)


def put(source: Path, target):
    """Moves a file to `target`, on the same disk or in a store. Readers never see half a file."""
    if is_remote(target):
        file_system(target).put_file(os.fspath(source), os.fspath(target))
        source.unlink()
    else:
        os.replace(source, target)


def remove_folder(folder):
    """Removes a folder and its content, if it exists."""
    store, name = file_system(folder), os.fspath(folder)
    if store.exists(name):
        store.rm(name, recursive=True)


def host_name() -> str:
    """The name of this host, in characters that are safe in names of files."""
    return re.sub("[^a-zA-Z0-9.-]", "-", socket.gethostname())[:64] or "unnamed"


@contextlib.contextmanager
def new_folder(folder: Path):
    """Yields an empty temporary folder, and renames it to `folder` at the end, unless another host
    has made `folder` meanwhile. After an exception the temporary folder is removed.
    """
    partial = folder.with_name(f"{folder.name}.partial-{host_name()}")
    shutil.rmtree(partial, ignore_errors=True)  # exists if a process of this host was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if not folder.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def local_copy(folder, cache="~/.cache/aoe_jax"):
    """Returns `folder` if it is on a disk, else a copy of it in `cache`. A new copy is made if a
    file of the folder, other than `REPORTS`, has changed since the last copy.
    """
    if not is_remote(folder):
        return folder
    what = f"{folder} cannot be copied to {cache}"
    root, store = os.fspath(folder).rstrip("/"), file_system(folder)
    files = sorted(patiently(what, lambda: store.find(root, detail=True)).items())
    prefix = f"{root.partition('://')[2]}/"
    parts = {name: name.removeprefix(prefix) for name, _ in files if name.startswith(prefix)}
    if not parts:
        raise UserError(f"{folder}: there is no such folder")
    for name, part in parts.items():
        if part.startswith("/") or ".." in part.split("/"):
            raise UserError(f"{folder} has an object {name!r}, whose copy would be elsewhere")
    state = [(name, _of_store(file)) for name, file in files if Path(name).name not in REPORTS]
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    target = Path(cache).expanduser() / "copies" / f"{folder.name}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            with new_folder(target) as new:
                for name, part in parts.items():
                    if not name.endswith("/"):
                        copy = new / part
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        patiently(what, functools.partial(store.get_file, name, str(copy)))
    return target


class Mirror:
    """Copies new and changed files from a folder on a disk to a folder in an object store."""

    def __init__(self, local: Path, remote):
        """Assumes that all files that are in `local` now are in `remote` with the same content."""
        self._local, self._remote = local, remote
        self._known = self._states()

    def _states(self):
        files = (path for path in self._local.rglob("*") if path.is_file())
        return {path: size_and_version(path) for path in files}

    def upload(self, last=""):
        """Copies new and changed files, and files with the name `last` after all others."""
        for path, state in sorted(self._states().items(), key=lambda file: file[0].name == last):
            if self._known.get(path) != state:
                target = self._remote / path.relative_to(self._local).as_posix()
                file_system(target).put_file(os.fspath(path), os.fspath(target))
                self._known[path] = state

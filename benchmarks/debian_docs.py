"""A second corpus of another kind: manuals from packages of Debian, as plain text.

`python -m benchmarks.debian_docs --output=DIR [--packages=perl-doc,python3.13-doc]` downloads the
packages with `apt-get download`, unpacks them with `dpkg-deb`, and writes their text sources
(`.pod`, `.rst.txt`) as `.txt` files, one document a file, about 20 MB. Train on them with
`--config.data.name=text --config.data.path=DIR`. `--packages` also takes `.deb` files.
"""

import subprocess
import tempfile
from pathlib import Path

from absl import flags

from aoe_jax import cli
from aoe_jax.errors import UserError
from aoe_jax.formats.writing import new_directory

PACKAGES = ["perl-doc", "python3.13-doc"]
SOURCES = ("*.pod", "*.rst.txt")


def collect(package, output: Path):
    """Writes the documents of a package, by name or as a `.deb` file, and returns their number.
    Raises `UserError` if it cannot be downloaded or unpacked, or has no text sources.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, folder = Path(package).absolute(), Path(folder)
        if not package.endswith(".deb"):
            _run(package, "apt-get", "download", package, cwd=folder)
            (file,) = folder.glob("*.deb")
        _run(package, "dpkg-deb", "--extract", str(file), "content", cwd=folder)
        content, name = folder / "content", file.name.partition("_")[0]
        found = sorted(path for pattern in SOURCES for path in content.rglob(pattern))
        if not found:
            raise UserError(f"--packages={package}: it has no {' or '.join(SOURCES)}")
        for path in found:
            target = output / name / path.relative_to(content).with_suffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text(encoding="utf-8", errors="replace"))
        return len(found)


def _run(package, *command, cwd):
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"--packages={package}: needs {command[0]}, a tool of Debian") from e
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:]
        raise UserError(f"--packages={package}: {command[0]} fails: {' '.join(reason)}")


def main():
    output = cli.path_of(flags.FLAGS["output"])
    with new_directory(output) as partial_output:
        for package in flags.FLAGS.packages:
            print(f"{package}: {collect(package, partial_output)} documents", flush=True)


if __name__ == "__main__":  # only here, so that tests can import this beside other commands
    flags.DEFINE_string("output", None, "a folder to write, which must not exist yet")
    flags.DEFINE_list("packages", PACKAGES, "names of packages, or .deb files")
    cli.run(main)

"""Documents from a package that is built here."""

import subprocess

import pytest

from aoe_jax.errors import UserError
from benchmarks.debian_docs import collect

CONTROL = "Package: manual\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"


def package_with(folder, **files):
    for name, text in {"DEBIAN/control": CONTROL, **files}.items():
        path = folder / "content" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = str(folder / "manual_1_all.deb")
    subprocess.run(["dpkg-deb", "--build", "content", package], cwd=folder, check=True)
    return package


def test_text_sources_of_a_package(tmp_path):
    files = {"usr/a/first.pod": "=head1 First", "usr/second.rst.txt": "Second", "usr/x.html": "no"}
    assert collect(package_with(tmp_path, **files), tmp_path / "out") == 2
    found = {p.relative_to(tmp_path / "out"): p.read_text() for p in tmp_path.rglob("out/**/*.txt")}
    assert {str(path): text for path, text in found.items()} == {
        "manual/usr/a/first.txt": "=head1 First",
        "manual/usr/second.rst.txt": "Second",
    }


def test_packages_that_do_not_serve(tmp_path):
    with pytest.raises(UserError, match="has no .*pod"):
        collect(package_with(tmp_path, **{"usr/x.html": "no"}), tmp_path / "out")
    with pytest.raises(UserError, match="dpkg-deb fails"):
        collect(str(tmp_path / "absent.deb"), tmp_path / "out")

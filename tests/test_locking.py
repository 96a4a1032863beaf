"""Where hosts that do not see each other's locks make the same folder."""

import os

import pytest
from aoe_jax.storage.locking import new_folder

from aoe_jax.storage import locking


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_host_to_finish_makes_the_folder(tmp_path, monkeypatch):
    with new_folder(tmp_path / "store") as ours:
        (ours / "ours").touch()
        with monkeypatch.context() as there:
            there.setattr(locking, "_host", lambda: "other")
            with new_folder(tmp_path / "store") as theirs:
                (theirs / "theirs").touch()
        assert names(ours) == ["ours"]
    assert names(tmp_path) == ["store"] and names(tmp_path / "store") == ["theirs"]


def test_what_killed_processes_left_is_removed(tmp_path):
    """That of another host only after a day, because it may be alive."""
    left = [tmp_path / f"store.partial-{name}" for name in (locking._host(), "dead", "alive")]
    for folder in left:
        folder.mkdir()
        (folder / "shard").touch()
    (tmp_path / "store.partial-file").touch()
    for path in (left[1], tmp_path / "store.partial-file"):
        os.utime(path, (0, 0))
    with new_folder(tmp_path / "store") as new:
        assert names(new) == []
    assert names(tmp_path) == ["store", "store.partial-alive"]


def test_a_folder_that_is_not_finished_is_removed(tmp_path):
    with pytest.raises(ValueError, match="a mistake"), new_folder(tmp_path / "deep" / "store"):
        raise ValueError("a mistake")
    assert names(tmp_path / "deep") == []

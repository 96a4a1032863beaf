import pytest

from aoe_jax.errors import UserError
from aoe_jax.locking import alone_in


def test_one_process_is_in_a_folder(tmp_path):
    second = alone_in(tmp_path, "workdir")
    with (
        alone_in(tmp_path, "workdir"),
        pytest.raises(
            UserError,
            match=r"--workdir=.*: another process is at work there; wait for it, or use another",
        ),
    ):
        second.__enter__()
    with alone_in(tmp_path, "workdir"):
        pass

"""Two methods are removed; `python -m tests.removable` removes each in turn."""

import pytest

from tests.removable import check


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynmoe", "thor"])
def test_everything_else_works_without_it(name):
    check(name)

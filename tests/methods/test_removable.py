"""A method is removed; `python -m tests.removable` removes each in turn."""

import pytest

from tests.removable import check


@pytest.mark.slow
def test_everything_else_works_without_dynmoe():
    check("dynmoe")

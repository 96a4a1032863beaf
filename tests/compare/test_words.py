import pytest

from aoe_jax.compare.words import number


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999.4, "999"),
        (999.6, "1k"),
        (1024, "1.02k"),
        (999.7e9, "1T"),
        (4e12, "4T"),
        (-2e6, "-2M"),
    ],
)
def test_numbers_have_three_digits(value, words):
    assert number(value) == words

"""Losses over sizes of equal training FLOPs, of invented results."""

import math

import pytest

from aoe_jax.compare.document import to_markdown
from aoe_jax.compare.scaling_sections import isoflop, scaling
from aoe_jax.compare.sections import losses, styles_of
from tests.compare.invented import active, comparison, size_at

FLOPS = 1e12


def valley(best, seeds_apart=0.002):
    return lambda run: 3 + 0.2 * math.log(active(run) / best) ** 2 + seeds_apart * run.seed


SIZES = {f"d{width}": size_at(FLOPS, width) for width in (32, 48, 64, 96)}


def test_a_parabola_finds_the_best_size():
    found = comparison(SIZES, valley(150_000))
    assert found.budgets_of_flops == [["d32", "d48", "d64", "d96"]]
    arms = found.isoflops(found.budgets_of_flops[0])
    # A dense model of all parameters spends more and more of its FLOPs on experts, the wider it is.
    assert set(arms) == {"moe", "aoe", "active"}
    for of in arms.values():
        assert of.fit.minimum() == pytest.approx(150_000, rel=1e-6)
        assert len(of.groups) == 4 and of.flops == pytest.approx(FLOPS, rel=0.1)
        assert of.fit(150_000) == pytest.approx(3.001)
    low, high = arms["moe"].fit.minimum_interval()
    assert low < 150_000 < high
    text = to_markdown(isoflop(found, styles_of(found)), "figures")
    assert "isoflop_1.png" in text and "150k [" in text
    assert "3.0010 | +0.000, +0.000, +0.000, +0.000 |" in text.replace("-0.000", "+0.000")
    assert "| dense | d32, d48, d64, d96 | differ by more than 10% | - | - | - |" in text
    assert "Not matched in total parameters: dense, active parameters of the MoE." in text
    assert scaling(found, styles_of(found)) == []  # no power law over sizes that cost the same


def test_what_a_parabola_does_not_find():
    beyond = comparison(SIZES, valley(3_000_000))
    assert "beyond the sizes |" in to_markdown(isoflop(beyond, styles_of(beyond)), "figures")
    hill = comparison(SIZES, lambda run: 6 - valley(150_000)(run))
    assert "none: it is no valley | - |" in to_markdown(isoflop(hill, styles_of(hill)), "figures")


def test_how_far_losses_lie_off_the_parabola():
    """What least squares leave of four sizes alternates in sign and adds up to 0; of three sizes
    they leave nothing.
    """
    ours = comparison(SIZES, lambda run: valley(150_000, 0.0)(run) + 0.1 * (run.size == "d32"))
    table = isoflop(ours, styles_of(ours))[-1]
    cells = [row[-1] for row in table.rows if row[-1] != "-"]
    assert len(cells) == 3
    for misses in ([float(miss) for miss in cell.split(", ")] for cell in cells):
        assert [miss > 0 for miss in misses] == [True, False, True, False]
        assert sum(misses) == pytest.approx(0, abs=2e-3)
    three = comparison({name: SIZES[name] for name in list(SIZES)[:3]}, valley(150_000))
    assert {row[-1] for row in isoflop(three, styles_of(three))[-1].rows} == {"-"}


def test_only_sizes_of_equal_flops_are_held_against_each_other():
    apart = {
        name: size_at(FLOPS, width, factor)
        for name, width, factor in (("a", 32, 1), ("b", 48, 1.08), ("c", 64, 1.2))
    }
    found = comparison(apart, valley(100_000))
    assert found.budgets_of_flops == [] and isoflop(found, styles_of(found)) == []
    assert scaling(found, styles_of(found))
    # Two budgets, and a size of none.
    more = {f"more{width}": size_at(3 * FLOPS, width) for width in (48, 64, 96)}
    found = comparison(more | SIZES | {"alone": size_at(FLOPS, 32, 10)}, valley(150_000))
    assert found.budgets_of_flops == [list(SIZES), list(more)]
    text = to_markdown(isoflop(found, styles_of(found)), "figures")
    assert "isoflop_1.png" in text and "isoflop_2.png" in text and "isoflop_3.png" not in text


def test_unmatched_arms_are_named_beside_the_losses():
    found = comparison(SIZES, valley(150_000))
    text = to_markdown(losses(found, styles_of(found)), "figures")
    assert "Not matched in total parameters: dense, active parameters of the MoE." in text
    assert (
        "dense, active parameters of the MoE is 0." in text
    )  # and held against the baseline all the same

from dataclasses import replace

from aoe_jax.compare.document import to_markdown
from aoe_jax.compare.sections import cost
from tests.compare.invented import comparison, size_at


def test_arms_are_named_as_they_are_at_each_size():
    found = comparison({"a": size_at(1e12, 32), "b": size_at(1e12, 64)}, lambda run: 1.0)
    assert [found.balance_of(size, "aoe") for size in "ab"] == [
        ("AoE, r=8", "L_aux"),
        ("AoE, r=16", "L_aux"),
    ]
    assert (
        found.balance_of("a", "moe") == ("MoE", "L_aux") and found.balance_of("a", "dense") is None
    )


def test_what_was_not_timed_in_turn_is_named():
    found = comparison({"a": size_at(1e12, 32), "b": size_at(1e12, 64)}, lambda run: 1.0)
    assert "But they are" not in to_markdown(cost(found), "figures")
    found.results[:] = [
        replace(r, timed_in_turn=r.run.size == "b" and r.run.arm != "moe") for r in found.results
    ]
    assert "what else was at work on the machine, at a, b (MoE, L_aux)." in to_markdown(
        cost(found), "figures"
    )

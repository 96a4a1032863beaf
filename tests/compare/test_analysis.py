from tests.compare.invented import comparison, size_at


def test_arms_are_named_as_they_are_at_each_size():
    found = comparison({"a": size_at(1e12, 32), "b": size_at(1e12, 64)}, lambda run: 1.0)
    assert [found.balance_of(size, "aoe") for size in "ab"] == [("AoE, r=8", "L_aux"), ("AoE, r=16", "L_aux")]
    assert found.balance_of("a", "moe") == ("MoE", "L_aux") and found.balance_of("a", "dense") is None

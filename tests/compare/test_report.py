"""The report of invented results: losses, budgets, fits over sizes, timing."""

import math
from dataclasses import replace

import pytest

from aoe_jax.compare.report import failed, paper_table
from aoe_jax.compare.statistics import holm
from configs.compare.arms import aoe, other_router
from tests.compare.invented import ARMS, markdown, results, size_at, table

FLOPS = 1e12
SIZE = size_at(FLOPS, 32)
LARGER = {"a": SIZE, "b": size_at(4 * FLOPS, 64)}


def test_scaling_is_fitted_over_sizes_that_differ_in_flops_only(tmp_path):
    nll = {("a", 0): 5.0, ("a", 1): 5.2, ("b", 0): 4.5, ("b", 1): 4.68}
    found = results(tmp_path, LARGER, lambda run: nll[run.size, run.seed])
    fitted = found.scaling("active_non_embedding")
    groups, (_, exponent) = fitted["aoe"]
    x = list(groups)
    assert set(fitted) == set(ARMS)
    assert exponent == pytest.approx(-math.log(0.9) / math.log(x[1] / x[0]))
    text = markdown(found)
    assert "scaling_flops.png" in text and f"| {exponent:.4f} |" in text

    corpora = {
        name: replace(size, changes=size.changes | {"data": {"name": "text", "path": name}})
        for name, size in LARGER.items()
    }
    for sizes in ({"a": SIZE, "b": size_at(FLOPS, 64)}, corpora):
        assert results(tmp_path, sizes, lambda run: 1.0).scaling("active_non_embedding") == {}


def test_losses_at_equal_flops_and_seconds(tmp_path):
    """By hand: losses are 5 at step 3 and 4 at step 6; a step of AoE takes twice the seconds."""
    sizes = {"a": replace(SIZE, changes=SIZE.changes | {"train": {"steps": 6, "warmup": 0.2}})}
    seconds = {"moe": 1.0, "aoe": 2.0, "dense": 1.0, "active": 1.0}
    options = {"curve": ([3, 6], [5.0, 4.0]), "seconds": lambda run: seconds[run.arm]}
    found, both = results(tmp_path, sizes, lambda run: 4.0, **options), ("aoe", "moe")
    assert found.budget("a", both, "seconds") == 6
    assert dict(found.nlls("a", "moe", "seconds", 6)) == {0: 4.0, 1: 4.0}
    # AoE is at step 3 by then.
    assert found.difference("a", "aoe", "seconds").value == pytest.approx(1.0)
    runs = found.runs.set_index("arm")["flops"].groupby("arm").first()[list(both)]
    budget = found.budget("a", both, "flops")
    assert budget == pytest.approx(runs.min())
    at = math.log(2 * runs.min() / runs.max()) / math.log(2)  # between steps 3 and 6
    other = found.nlls("a", runs.idxmax(), "flops", budget)
    assert other[0] == pytest.approx(5 - at)
    row = table(markdown(found), "At equal FLOPs and at equal seconds")[0]
    assert row[0] == "a: AoE r=d/4, L_aux" and row[4:6] == ["6 s", "5.0000 ± 0.0000"]
    by_top_p, by_expert_choice = (
        results(
            tmp_path, sizes, lambda run: 4.0, arms=ARMS | {"aoe": other_router(aoe(4, "aux"), name)}
        )
        for name in ("top_p", "expert_choice")
    )
    assert by_top_p.difference("a", "aoe").n == 2
    assert by_top_p.difference("a", "aoe", "flops").n == 0
    assert by_expert_choice.difference("a", "aoe").n == 0  # it knows of later tokens


def test_an_arm_may_be_compared_to_another_than_the_baseline(tmp_path):
    """A failed run is listed with the last line of its log."""
    arms = ARMS | {"twin": replace(ARMS["aoe"], label="twin", reference="aoe")}
    found = results(
        tmp_path, {"a": SIZE}, lambda run: 5.0 + (run.arm == "twin") + 0.01 * run.seed, arms=arms
    )
    assert found.difference("a", "twin").value == pytest.approx(1)
    assert table(markdown(found), "Final validation loss")[-1][-2].endswith("] to AoE r=d/4, L_aux")
    noisy = results(tmp_path, {"a": SIZE}, lambda run: 5.0 + ord(run.arm[0]) * (run.seed + 2) % 13)
    ends = noisy.differences()[lambda rows: rows["at_equal"] == "end"]
    assert len(ends) > 1 and ends["p_holm"].tolist() == holm(ends["p"]).tolist()
    cells = [row[-1] for row in table(markdown(noisy), "Final validation loss")]
    assert cells == ["-", *(f"{p:.2g}" for p in ends["p_holm"])]
    # Brackets of a log would be links in Markdown, and a pipe would end the cell.
    found.runs.loc[0, ["state", "last_line"]] = "failed", "x['a'][1] | `y`"
    (row,) = failed(found, tmp_path)
    assert row["last line"] == "`x['a'][1] ¦ 'y'`"


def test_the_table_for_a_paper_has_arms_of_one_size_only(tmp_path):
    sizes = LARGER | {"b": replace(LARGER["b"], arms=("moe", "aoe"))}
    found = results(tmp_path, sizes, lambda run: 3.0 + 0.1 * run.seed + 0.2 * (run.arm == "dense"))
    dense = paper_table(found).set_index("method").loc[ARMS["dense"].label]
    assert dense["a: difference"].startswith("+0.2000")
    assert (dense["b: nll"], dense["b: difference"]) == ("-", "-")

"""What the report says of invented results: losses, budgets, fits over sizes, timing."""

import math
import re
from dataclasses import replace

import pytest

from aoe_jax.compare.report import balanced, failed
from aoe_jax.compare.statistics import exponent, minimum
from aoe_jax.compare.suite import Arm
from aoe_jax.errors import UserError
from aoe_jax.model.counts import parameter_counts
from configs.compare.arms import aoe, capacity, moe, other_router, weights_over_all
from tests.compare.invented import ARMS, comparison, markdown, results, size_at, suite_of, table

FLOPS = 1e12
SIZES = {f"d{width}": size_at(FLOPS, width) for width in (32, 48, 64, 96)}
TWO = {"a": size_at(FLOPS, 32), "b": size_at(FLOPS, 64)}


def flat(text):
    """Text with single spaces, so that neither line breaks nor the widths of tables matter."""
    return re.sub(r"\s+", " ", text)


def test_arms_that_differ_in_their_balance_alone_are_compared():
    assert balanced(comparison(TWO, lambda run: 1.0)) == [
        (size, arm, arm) for size in TWO for arm in ("moe", "aoe")
    ]
    others = {
        "free": moe("free"),
        "chosen": other_router(aoe(4, "none"), "expert_choice"),
        "capacity": capacity(1.25),
        "uoe": Arm(
            "UoE",
            {"experts": {"kind": "uoe"}, "balance": {"aux_weight": 0.0}},
            matched=False,
        ),
        "over_all": weights_over_all(moe("free")),
    }
    found = results(suite_of({"a": TWO["a"]}, arms=ARMS | others), lambda run: 1.0)
    pairs = [("moe", "moe"), ("free", "moe")]
    pairs += [(arm, arm) for arm in ("aoe", "chosen", "capacity", "uoe", "over_all")]
    assert balanced(found) == [("a", *pair) for pair in pairs]
    rows = table(markdown(found), "Balance of load")
    assert rows[1][0] == "a: MoE, loss-free" and rows[1][-1].endswith("] to MoE, L_aux")


def test_gaps_during_training_are_paired():
    found = comparison(TWO, lambda run: 1.0)
    curves = found.curves
    of_aoe = (curves["arm"] == "aoe") & (curves["split"] == "validation")
    curves["nll"] += curves["seed"]  # common to all arms
    curves.loc[of_aoe & (curves["step"] == 1), "nll"] += 0.5
    curves.loc[of_aoe & (curves["step"] == 2), "nll"] -= 0.25
    first = found.finished("a", "moe").iloc[0]
    config = first["config"]
    tokens = config.train.batch_size * config.data.seq_len
    gaps = found.gaps("a")
    assert list(gaps) == ["aoe", "dense", "active"]
    assert list(gaps["aoe"]) == [0.5, -0.25] and list(gaps["dense"]) == [0, 0]
    assert list(gaps.index) == [n * tokens / first["active_non_embedding"] for n in (1, 2)]
    found.runs.loc[(found.runs["arm"] == "aoe") & (found.runs["seed"] == 1), "state"] = "unfinished"
    assert list(found.gaps("a")["aoe"]) == [0.5, -0.25]
    assert "figures/gaps.png" in markdown(found)


def test_the_last_line_of_a_failed_run_is_code(tmp_path):
    """Brackets of a log would be links in Markdown, and a pipe would end the cell."""
    found = comparison({"a": TWO["a"]}, lambda run: 1.0)
    found.runs.loc[0, ["state", "last_line"]] = "failed", "x['a'][1] | `y`"
    (row,) = failed(found, tmp_path)
    assert row["last line"] == "`x['a'][1] ¦ 'y'`"


def test_what_was_not_timed_in_turn_is_named():
    assert "Exceptions" not in markdown(comparison(TWO, lambda run: 1.0))

    def in_turn(run):
        return run.size == "b" and run.arm != "moe"

    found = results(suite_of(TWO), lambda run: 1.0, timed_in_turn=in_turn)
    text = flat(markdown(found))
    assert "Exceptions: seconds are the median over the training steps of each run" in text
    assert "other programs on the machine, at a, b (MoE, L_aux)." in text


def valley(best, seeds_apart=0.002):
    def loss(run):
        active = parameter_counts(run.config).active_non_embedding
        return 3 + 0.2 * math.log(active / best) ** 2 + seeds_apart * run.seed

    return loss


def test_a_parabola_finds_the_best_size():
    found = comparison(SIZES, valley(150_000))
    assert found.isoflop_sizes == [["d32", "d48", "d64", "d96"]]
    arms = found.isoflops(found.isoflop_sizes[0])
    # A dense model of all parameters spends more and more of its FLOPs on experts, the wider it is.
    assert set(arms) == {"moe", "aoe", "active"}
    for arm, (groups, fit) in arms.items():
        assert fit.figure(minimum) == pytest.approx(150_000, rel=1e-6)
        assert len(groups) == 4
        assert found.over_sizes(SIZES, arm)["flops"].mean() == pytest.approx(FLOPS, rel=0.1)
        assert fit(150_000) == pytest.approx(3.001)
    _, fit = arms["moe"]
    low, high = fit.interval(minimum)
    assert low < 150_000 < high
    text = flat(markdown(found))
    assert "isoflop_1.png" in text and "150k [" in text
    assert "3.0010 | +0.000, +0.000, +0.000, +0.000 |" in text.replace("-0.000", "+0.000")
    assert "| dense | d32, d48, d64, d96 | differ by more than 10% | - | - | - |" in text
    assert "Not matched in total parameters: dense, active parameters of the MoE." in text
    assert "## Scaling" not in text  # no power law over sizes that cost the same
    # Arms that are not matched are named beside the losses, and compared all the same.
    assert "At d32, dense, active parameters of the MoE is 0." in text


def isoflop_rows(sizes, loss):
    return table(markdown(comparison(sizes, loss)), "At equal FLOPs, over sizes")


def test_what_a_parabola_does_not_find():
    beyond = isoflop_rows(SIZES, valley(3_000_000))
    assert any(row[3].endswith("outside the sizes") for row in beyond)
    hill = isoflop_rows(SIZES, lambda run: 6 - valley(150_000)(run))
    assert ["none: the parabola has no minimum", "-"] in [row[3:5] for row in hill]


def test_how_far_losses_lie_off_the_parabola():
    """Residuals of four sizes alternate in sign and add up to 0; three sizes leave none."""
    rows = isoflop_rows(SIZES, lambda run: valley(150_000, 0.0)(run) + 0.1 * (run.size == "d32"))
    last = [row[-1] for row in rows if row[-1] != "-"]
    assert len(last) == 3
    for misses in ([float(miss) for miss in cell.split(", ")] for cell in last):
        assert [miss > 0 for miss in misses] == [True, False, True, False]
        assert sum(misses) == pytest.approx(0, abs=2e-3)
    three = isoflop_rows({name: SIZES[name] for name in list(SIZES)[:3]}, valley(150_000))
    assert {row[-1] for row in three} == {"-"}


def test_only_sizes_of_equal_flops_are_compared():
    apart = {
        name: size_at(FLOPS, width, factor)
        for name, width, factor in (("a", 32, 1), ("b", 48, 1.08), ("c", 64, 1.2))
    }
    found = comparison(apart, valley(100_000))
    assert found.isoflop_sizes == []
    text = markdown(found)
    assert "At equal FLOPs, over sizes" not in text and "## Scaling" in text
    # Two budgets, and a size of none.
    more = {f"more{width}": size_at(3 * FLOPS, width) for width in (48, 64, 96)}
    found = comparison(more | SIZES | {"alone": size_at(FLOPS, 32, 10)}, valley(150_000))
    assert found.isoflop_sizes == [list(SIZES), list(more)]
    text = markdown(found)
    assert "isoflop_1.png" in text and "isoflop_2.png" in text and "isoflop_3.png" not in text


def test_no_fit_over_settings():
    """Other corpora, or other numbers of experts, are no larger or smaller models."""
    settings = {
        name: replace(size, changes=size.changes | {"data": {"name": "text", "path": f"texts_{i}"}})
        for i, (name, size) in enumerate(SIZES.items())
    }
    found = comparison(settings, valley(150_000))
    assert found.isoflop_sizes == [] and found.scaling("active_non_embedding") == {}


def test_scaling_is_fitted_over_sizes():
    nll = {("a", 0): 5.0, ("a", 1): 5.2, ("b", 0): 4.5, ("b", 1): 4.68}
    sizes = {"a": TWO["a"], "b": size_at(4 * FLOPS, 64)}
    found = comparison(sizes, lambda run: nll[run.size, run.seed])
    fitted = found.scaling("active_non_embedding")
    groups, fit = fitted["aoe"]
    x = list(groups)
    assert set(fitted) == set(ARMS)
    assert fit.figure(exponent) == pytest.approx(-math.log(0.9) / math.log(x[1] / x[0]))
    text = markdown(found)
    assert "scaling_flops.png" in text and f"{fit.figure(exponent):.4f} [" in text


def test_losses_at_equal_flops_and_seconds():
    """By hand: losses are 5 at step 3 and 4 at step 6; a step of AoE takes twice the seconds."""
    sizes = {
        "a": replace(TWO["a"], changes=TWO["a"].changes | {"train": {"steps": 6, "warmup": 0.2}})
    }
    seconds = {"moe": 1.0, "aoe": 2.0, "dense": 1.0, "active": 1.0}

    def results_of(**changes):
        return results(
            suite_of(sizes, **changes),
            lambda run: 4.0,
            curve=([3, 6], [5.0, 4.0]),
            seconds_per_step=lambda run: seconds[run.arm],
        )

    found, both = results_of(), ("aoe", "moe")
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
        results_of(arms=ARMS | {"aoe": other_router(aoe(4, "aux"), name)})
        for name in ("top_p", "expert_choice")
    )
    assert by_top_p.difference("a", "aoe").n == 2
    assert by_top_p.difference("a", "aoe", "flops").n == 0
    assert by_expert_choice.difference("a", "aoe").n == 0  # it knows of later tokens


def test_an_arm_may_be_compared_to_another_than_the_baseline():
    twin = replace(ARMS["aoe"], label="twin", reference="aoe")
    suite = suite_of({"a": TWO["a"]}, arms=ARMS | {"twin": twin})
    found = results(suite, lambda run: 5.0 + (run.arm == "twin") + 0.01 * run.seed)
    assert found.difference("a", "twin").value == pytest.approx(1)
    text = markdown(found)
    assert "nats above AoE r=d/4, L_aux (" in text
    assert table(text, "Final validation loss")[-1][-1].endswith("] to AoE r=d/4, L_aux")
    with pytest.raises(UserError, match=r"arms\['twin'\]\.reference='nobody'"):
        replace(suite, arms=suite.arms | {"twin": replace(twin, reference="nobody")})


def test_intervals_decide_what_is_indistinguishable():
    apart = {"moe": [5.0, 5.1], "aoe": [5.3, 5.41], "dense": [5.3, 4.9], "active": [5.0, 5.1]}
    found = results(suite_of({"a": TWO["a"]}), lambda run: apart[run.arm][run.seed])
    lines = markdown(found).splitlines()
    aoe_, dense, _ = (line for line in lines if line.startswith("- At a, "))
    assert aoe_.endswith("2 seeds): the interval excludes 0.")
    assert dense.endswith("2 seeds): statistically indistinguishable.")

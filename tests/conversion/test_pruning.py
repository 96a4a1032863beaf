"""A model pruned as a whole: what is refused, and what is done with models without a run."""

import dataclasses

import numpy as np
import pytest

from aoe_jax.conversion.pruning import check_prunes, prune, prune_table
from aoe_jax.errors import UserError
from tests.conversion.models import model_of
from tests.evaluation.models import make_config
from tests.runs import contents, finished_run

LARGE = {"experts__kind": "router", "experts__large_router": True}
KINDS = {"smear": {"routing__segment": 8}, "thor": {}, "uoe": {}}
REFUSED = [
    ({"experts__kind": "dense"}, 2, "--workdir=DIR has experts.kind='dense'"),
    *(
        ({"routing__name": name}, 2, f"routing.name={name!r}: pruning is not implemented")
        for name in ("expert_choice", "threshold")
    ),
    *(
        ({"experts__kind": kind} | changes, 2, f"routing.name={kind!r}: pruning is not implemented")
        for kind, changes in KINDS.items()
    ),
    ({"experts__score_neurons": 4}, 2, "experts.score_neurons=4: merging reorders the neurons"),
    (LARGE, 2, "the width of a large router depends on its experts"),
    ({}, 1, "--experts=1: must be at least experts.top_k=2 and fewer than the 4"),
    ({}, 4, "--experts=4: must be at least experts.top_k=2 and fewer than the 4"),
]


@pytest.mark.parametrize(("changes", "n_experts", "words"), REFUSED)
def test_refused_by_name(changes, n_experts, words):
    with pytest.raises(UserError) as error:
        check_prunes(
            dataclasses.replace(model_of("aoe"), config=make_config(**changes)), n_experts, "DIR"
        )
    assert words in str(error.value)


def test_a_directory_that_exists_is_left_alone(tmp_path):
    (tmp_path / "here").write_text("precious")
    with pytest.raises(UserError, match="--output=.* exists already"):
        prune(finished_run(), tmp_path, 2)
    assert contents(tmp_path) == {"here": b"precious"}


@pytest.mark.parametrize("data", ["text@/no/such/folder", "sotu=much"])
def test_corpora_that_cannot_be(tmp_path, data):
    with pytest.raises(UserError) as error:
        prune(finished_run(), tmp_path / "model", 2, data=data)
    assert str(error.value).startswith(f"--data={data}: ") and not list(tmp_path.iterdir())


def test_the_table():
    clusters = [
        {"reference": 2, "members": [0, 2], "weights": [0.2, 0.8]},
        {"reference": 1, "members": [1], "weights": [1]},
    ]
    layer = {"load": [0.2, 1.0, 0.8], "load_entropy": 0.9, "load_entropy_after": 0.6}
    layer["clusters"] = clusters
    rows = prune_table({"layers": [layer], "nll": {"before": 4.0, "after": 4.25}}).splitlines()
    assert rows[1].split() == ["0", "0.900", "0.600", "0+2", "50.0%", "1", "50.0%"]
    assert f"at most {np.log(3):.3f}, then {np.log(2):.3f}; validation nll: " in rows[2]
    assert rows[2].endswith("before 4.0000, after 4.2500")

"""The log of a run before it starts; `tests/test_train.py` has the rest."""

import pytest

from aoe_jax.config.run import Config
from aoe_jax.training.loop import log_run
from configs import methods


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("top_k", None),
        ("threshold", "threshold is not causal before step 200: "),
        ("expert_choice", "expert_choice is not causal: "),
    ],
)
def test_a_warning_if_losses_depend_on_later_tokens(caplog, variant, words):
    groups = methods.get_config(variant)
    if variant == "threshold":
        groups.routing.warmup_steps = 200
    log_run(Config.from_config_dict(groups))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        (not warnings) if words is None else (len(warnings) == 1 and warnings[0].startswith(words))
    ), warnings

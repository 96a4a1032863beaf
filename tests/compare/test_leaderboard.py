"""A new method enters the leaderboard by its file, a line and a command, here in miniature."""

import json

import pandas as pd
import pytest

from tests.compare.suites import SHORT
from tests.runs import finish, scratch, settings, start

SUITE = """
import dataclasses, json
from aoe_jax.compare.suite import Size
from configs.compare import leaderboard
from configs.compare.arms import moe

SETTINGS = json.loads('''{settings}''')
leaderboard.ARMS["close"] = leaderboard.in_file(moe("none"), "logits", {method}, "MoE, close")


def get_suite():
    suite = leaderboard.get_suite()
    known = {{name: value for name, value in SETTINGS.items() if value is not None}}
    suite.base.update_from_flattened_dict(known)
    sizes = {{"149k": Size({{}}, seeds=2)}}
    return dataclasses.replace(suite, sizes=sizes, routing_tokens=256)
"""
CLOSE = """
from dataclasses import dataclass
import jax
from aoe_jax.config.checks import setting
from aoe_jax.moe.routing import Method, by_mask

@dataclass(frozen=True)
class Close(Method):
    margin: float = setting(0.1, at_least=0)

    def __call__(self, scores, weights, ctx):
        chosen = scores >= scores.max(axis=1, keepdims=True) - self.margin
        return by_mask(chosen, jax.nn.softmax(scores, where=chosen, axis=1))
"""


@pytest.mark.slow
def test_a_method_of_ones_own_enters():
    folder = scratch("leaderboard")
    (folder / "close.py").write_text(CLOSE)
    method = {"name": f"{folder}/close.py:Close", "margin": 0.5}
    text = SUITE.format(settings=json.dumps(settings(**SHORT)), method=method)
    (folder / "suite.py").write_text(text)
    given = [f"--suite={folder}/suite.py", f"--workdir={folder}/work", "--arms=close"]
    status, _, stderr = finish(start(["-m", "aoe_jax.compare", *given]))
    assert status == 0, stderr
    (folder / "work/README.md").write_text("Entries:\n<!-- 149k -->\n<!-- end -->\n")
    page = start(["-m", "benchmarks.leaderboard", f"--folder={folder}/work"])
    status, _, stderr = finish(page)
    assert status == 0, stderr
    text = (folder / "work/README.md").read_text()
    assert "| close " in text and "| MoE, L_aux, Muon " in text and text.endswith("<!-- end -->\n")
    runs = pd.read_csv(folder / "work/runs.csv")
    assert sorted(zip(runs["arm"], runs["seed"], strict=True)) == [
        ("close", 0),
        ("close", 1),
        ("moe", 0),
        ("moe", 1),
    ]
    found = pd.read_csv(folder / "work/differences.csv")
    assert found[found["at_equal"] == "end"][["arm", "to", "n"]].values.tolist() == [
        ["close", "moe", 2]
    ]

"""What a timed step is a step of."""

import json

import pytest

from tests.runs import finished_runs, run

FIRST_STEP = """
import json, sys
from pathlib import Path
import jax
from aoe_jax.compare.routing import validation_batches
from aoe_jax.compare.step_times import RepeatedStep
from aoe_jax.config import Config
from aoe_jax.evaluation.models import load_model
from aoe_jax.evaluation.perplexity import make_eval_step
from aoe_jax.json_files import read_json
folder = Path(sys.argv[1])
config, model = Config.from_config_dict(read_json(folder / "config.json")), load_model(folder)
batch = model.put(next(validation_batches(folder, config, config.train.batch_size)))
eval_step = make_eval_step(model.decoder, model.config.data.document_mask)
with jax.set_mesh(model.mesh):
    nll, tokens, _ = jax.jit(eval_step)(model.params, model.routing_state, batch)
trained, drawn = RepeatedStep(config, folder), RepeatedStep(config)
print(json.dumps([float(nll.sum() / tokens), *(float(step()["nll"]) for step in (trained, drawn))]))
"""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_one_of_the_trained_model_on_its_validation_split(accumulate):
    status, stdout, stderr = run(["-c", FIRST_STEP, str(finished_runs()[accumulate])])
    assert status == 0, stderr
    evaluated, trained, drawn = json.loads(stdout)
    assert trained == pytest.approx(evaluated, rel=1e-4)
    assert abs(drawn - evaluated) > 0.1

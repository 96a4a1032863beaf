"""AoE models in transformers, by the code that is written beside them."""

import numpy as np
import pytest

from tests.formats.hub import load_there, logits_here, logits_there
from tests.formats.test_writing import EVERYTHING, written
from tests.runs import tiny_config

WHOLE = {"experts__score_neurons": 4}
FORMS = {
    "factorised": {},
    "factorised, max": {"experts__score": "max"},
    "factorised, biased": {"balance__bias_rate": 0.01, "routing__norm_topk_prob": False},
    "factorised, everything": EVERYTHING,
    "whole": WHOLE | {"model__n_kv_heads": 1, "model__tie_embeddings": False},
    "whole, max": WHOLE | {"experts__score": "max", "experts__top_k": 3},
    "whole, over all": WHOLE | {"routing__norm_topk_prob": False, "experts__score": "relu_norm"},
}
TOKENS = np.random.default_rng(1).integers(0, 512, (4, 48))


@pytest.mark.parametrize("form", FORMS)
def test_logits(tmp_path, form):
    directory, *_ = written(tmp_path, tiny_config(**FORMS[form]))
    expected = logits_here(directory, TOKENS)
    assert np.abs(expected).max() > 1
    for attention in ("sdpa", "eager"):
        found = logits_there(directory, TOKENS, attn_implementation=attention)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

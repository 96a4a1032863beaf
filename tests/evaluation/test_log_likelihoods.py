"""Log-likelihoods of batches against one plain pass for each text."""

import functools
from functools import partial

import jax
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation import log_likelihoods
from aoe_jax.evaluation.log_likelihoods import Scorer
from tests.evaluation.models import make_config, make_model, plain_scores

pytestmark = pytest.mark.usefixtures("ragged")

ONE_LAYER = {"model__n_layers": 1}
MESH = {"mesh__fsdp": 2, "mesh__expert": 2, "mesh__tensor": 2, "mesh__data": 1}
KINDS = {
    "aoe": {},
    "top_p, untied": ONE_LAYER
    | {"experts__kind": "router", "routing__name": "top_p", "model__tie_embeddings": False},
    "dense": ONE_LAYER | {"experts__kind": "dense"},
    # It cannot be decoded by token.
    "smear": ONE_LAYER
    | {"experts__kind": "smear", "routing__segment": 8, "balance__aux_weight": 0.0},
    "mesh": ONE_LAYER | MESH | {"experts__round_to": 8},
}
LENGTHS = (2, 35, 50)  # tokens of texts


def make_requests(lengths=LENGTHS, count=23, seed=0):
    """Texts of these lengths, cut anywhere into context and continuation; shared contexts; and
    texts that are too long.
    """
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 300, lengths[i % len(lengths)]).tolist() for i in range(count)]
    cuts = [int(rng.integers(1, len(text))) for text in texts]
    requests = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    shared = [(list(range(7, 47)), text[: i % 9]) for i, text in enumerate(texts[:5])]
    shared += [(list(range(9, 45)), [3]), (list(range(9, 45)), [5]), (list(range(70)), [4, 5, 6])]
    long = [(list(range(70)), [7, 8, 9]), ([5], list(range(64)))]
    return [*requests, *shared, *long, (list(range(200)), list(range(64)))]


@functools.cache
def scored(kind):
    model = make_model(make_config(**KINDS[kind]))
    return model, Scorer(model, batch_tokens=256)


@pytest.mark.parametrize(
    "kind", [k if k == "aoe" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_scores_are_those_of_single_passes(kind):
    model, scorer = scored(kind)
    requests = make_requests(LENGTHS if kind == "aoe" else LENGTHS[2:3])
    scores = scorer(requests)
    for (score, greedy), request in zip(scores, requests, strict=True):
        expected, expected_greedy = plain_scores(model, *request)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.fixture
def batches(monkeypatch):
    """The batches that are put on the devices."""
    found, put_batch = [], log_likelihoods.put_batch

    def put(sharding, batch):
        found.append(batch)
        return put_batch(sharding, batch)

    monkeypatch.setattr(log_likelihoods, "put_batch", put)
    return found


@pytest.mark.parametrize("kind", ["aoe", pytest.param("mesh", marks=pytest.mark.slow)])
def test_shared_contexts_are_read_once_with_the_same_result(kind, batches):
    scorer = scored(kind)[1]
    context = list(range(40, 90))
    requests = [(context, [5]), (context, [6, 7, 8]), ([*context[:-1], 3], [6]), (context, [9])]
    together = scorer(requests)
    assert sum(batch["contexts"].any(axis=1).sum() for batch in batches if "contexts" in batch) == 1
    apart = [scorer([request])[0] for request in requests]
    assert not any("contexts" in batch for batch in batches[2:])
    for (score, greedy), (of_one, greedy_of_one) in zip(together, apart, strict=True):
        assert score == pytest.approx(of_one, abs=1e-4) and greedy == greedy_of_one


def test_few_shapes_are_compiled(batches):
    scored("aoe")[1](make_requests(range(2, 65), count=100))
    shapes = [batch["inputs"].shape for batch in batches]
    assert len(shapes) > 10 and len(set(shapes)) <= 7
    assert {length for _, length in shapes} <= {16, 32, 48, 64}


def test_logits_of_a_batch_are_never_whole():
    model = make_model(make_config(model__vocab_size=8192))
    batch = log_likelihoods._texts_arrays([(tuple(range(62)), (1, 2, 3))] * 64, 64, 64)
    score = jax.jit(partial(log_likelihoods._score_texts, model.decoder))
    memory = score.lower(model.params, None, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 64 * 8192 * 4 / 4


def test_odd_and_bad_requests():
    scorer = scored("aoe")[1]
    assert scorer([([1, 2], [])]) == [(0.0, True)]
    assert scorer([]) == []
    with pytest.raises(UserError, match=r"model\.max_len=64: a continuation has 65 tokens"):
        scorer([([1], [2] * 65)])


@pytest.mark.slow
def test_models_that_depend_on_other_tokens_are_refused():
    for changes in ({"routing__name": "expert_choice"}, {"experts__kind": "capacity"}):
        with pytest.raises(UserError, match="cannot score a text by itself"):
            Scorer(make_model(make_config(**changes)))


def test_scores_that_are_not_finite_are_refused():
    model = make_model(make_config(), lambda params: jax.tree.map(lambda a: a * np.nan, params))
    with pytest.raises(UserError, match="the model gives log-likelihoods that are not finite"):
        Scorer(model)([([1], [2])])

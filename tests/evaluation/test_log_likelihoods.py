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
    """Texts of so many tokens, cut anywhere into context and continuation; and more than the model
    takes.
    """
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 300, lengths[i % len(lengths)]).tolist() for i in range(count)]
    cuts = [int(rng.integers(1, len(text))) for text in texts]
    requests = [(text[:cut], text[cut:]) for text, cut in zip(texts, cuts, strict=True)]
    shared = [(list(range(7, 47)), text[: i % 9]) for i, text in enumerate(texts[:5])]
    shared += [(list(range(9, 45)), [3]), (list(range(9, 45)), [5]), (list(range(70)), [4, 5, 6])]
    return [
        *requests,
        *shared,
        (list(range(70)), [7, 8, 9]),
        ([5], list(range(64))),
        (list(range(200)), list(range(64))),
    ]


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
    scores = scorer(requests, progress=False)
    for (score, greedy), request in zip(scores, requests, strict=True):
        expected, expected_greedy = plain_scores(model, *request)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.slow
def test_what_greedy_decoding_gives_is_greedy():
    scorer = scored("aoe")[1]
    context, continuation = [3, 4, 5], []
    for _ in range(3):
        following = [(context + continuation, [token]) for token in range(300)]
        scores = scorer(following, progress=False)
        continuation += following[max(range(300), key=lambda i: scores[i][0])][1]
        assert sum(greedy for _, greedy in scores) == 1
    wrong = [*continuation[:1], (continuation[1] + 1) % 300, *continuation[2:]]
    assert [greedy for _, greedy in scorer([(context, continuation), (context, wrong)], False)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("kind", ["aoe", pytest.param("mesh", marks=pytest.mark.slow)])
def test_shared_contexts_are_read_once_with_the_same_result(kind, monkeypatch):
    scorer, read = scored(kind)[1], []
    put_batch = log_likelihoods.put_batch
    monkeypatch.setattr(
        log_likelihoods,
        "put_batch",
        lambda where, batch: read.append(batch) or put_batch(where, batch),
    )
    context = list(range(40, 100))[:50]
    requests = [(context, [5]), (context, [6, 7, 8]), ([*context[:-1], 3], [6]), (context, [9])]
    together = scorer(requests, progress=False)
    assert sum(batch["contexts"].any(axis=1).sum() for batch in read if "contexts" in batch) == 1
    apart = [scorer([request], progress=False)[0] for request in requests]
    assert not any("contexts" in batch for batch in read[2:])
    np.testing.assert_allclose(
        [score for score, _ in together], [score for score, _ in apart], atol=1e-4
    )
    assert [greedy for _, greedy in together] == [greedy for _, greedy in apart]


def test_few_shapes_are_compiled(monkeypatch):
    shapes = []
    put_batch = log_likelihoods.put_batch
    monkeypatch.setattr(
        log_likelihoods,
        "put_batch",
        lambda where, batch: shapes.append(batch["inputs"].shape) or put_batch(where, batch),
    )
    scored("aoe")[1](make_requests(range(2, 65), count=100), progress=False)
    assert len(shapes) > 10 and len(set(shapes)) <= 7
    assert {length for _, length in shapes} <= {16, 32, 48, 64}


def test_logits_of_a_batch_are_never_whole():
    model = make_model(make_config(model__vocab_size=8192))
    batch = log_likelihoods._texts_arrays([(tuple(range(62)), (1, 2, 3))] * 64, 64, 64)
    program = (
        jax.jit(partial(log_likelihoods._score_texts, model.decoder))
        .lower(model.params, None, batch)
        .compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < 64 * 64 * 8192 * 4 / 4


def test_an_empty_continuation_costs_nothing():
    assert scored("aoe")[1]([([1, 2], [])], progress=False) == [(0.0, True)]
    assert scored("aoe")[1]([], progress=False) == []


def test_bad_requests():
    scorer = scored("aoe")[1]
    with pytest.raises(UserError, match=r"model\.max_len=64: a continuation has 65 tokens"):
        scorer([([1], [2] * 65)], progress=False)
    with pytest.raises(ValueError, match="one token at least"):
        scorer([([], [2])], progress=False)


@pytest.mark.slow
def test_what_depends_on_other_tokens_is_refused():
    with pytest.raises(UserError, match="expert_choice': cannot score a text by itself"):
        Scorer(make_model(make_config(routing__name="expert_choice")))
    with pytest.raises(UserError, match="name='capacity': cannot score a text by itself"):
        Scorer(make_model(make_config(experts__kind="capacity", experts__top_k=1)))


def test_what_is_not_finite_is_refused():
    model = make_model(make_config(), lambda params: jax.tree.map(lambda a: a * np.nan, params))
    with pytest.raises(UserError, match="the model gives log-likelihoods that are not finite"):
        Scorer(model)([([1], [2])], progress=False)

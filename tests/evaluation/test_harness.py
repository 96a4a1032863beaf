"""The adapter for lm-eval against plain passes, and against lm-eval's own `hf` backend."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from aoe_jax.errors import UserError
from aoe_jax.evaluation.harness import HarnessModel
from aoe_jax.formats.configs import to_json
from aoe_jax.formats.tokenizer_files import write_tokenizer
from aoe_jax.formats.writing import parameters_of, write_model
from tests.evaluation.models import by_full_passes, make_config, make_model, plain_scores

pytestmark = pytest.mark.usefixtures("ragged")
TEXTS = [
    "the state of the union is the state of law",
    "a cat sat",
    "peace and war, law and order: yes or no? " * 9,  # longer than the model takes
    " ",
    "z",
]
PAIRS = [
    ("the state of", " the union"),
    ("the state of", " peace"),
    ("the state of ", "the union"),  # the space goes to the continuation
    ("", "a cat"),
    ("the cat sat on a mat " * 9, "and order:"),  # cut from the left
    ("un", "ion"),
    ("é", "è\n"),
]


def ask(lm, kind, *arguments):
    """The answers of a model of lm-eval to requests of a kind."""
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
    return getattr(lm, kind)(requests)


@functools.cache
def router_model():
    return make_model(make_config(experts__kind="router"))


@functools.cache
def adapter():
    return HarnessModel(router_model())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["router", "aoe"])
def test_log_likelihoods_are_those_of_the_hf_backend(tmp_path, kind):
    """The model is a Mixtral, or an AoE with the classes beside it."""
    from lm_eval.models.huggingface import HFLM  # needs torch

    model = router_model()
    if kind == "aoe":
        model = make_model(make_config(experts__score_neurons=4))
    model.tokenizer.save(tmp_path)
    directory = tmp_path / "model"
    directory.mkdir()
    values = to_json(model.config) | write_tokenizer(tmp_path, directory, 64)
    write_model(directory, values, *parameters_of(model.params))
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4, "trust_remote_code": True}
    theirs = HFLM(str(directory), backend="causal", **settings)
    models = HarnessModel(model), theirs
    ours, theirs = (ask(lm, "loglikelihood", *PAIRS) for lm in models)
    scores = ([score for score, _ in answers] for answers in (ours, theirs))
    np.testing.assert_allclose(*scores, atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = [(text,) for text in TEXTS]
    ours, theirs = (ask(lm, "loglikelihood_rolling", *texts) for lm in models)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_log_likelihoods_are_those_of_plain_passes():
    lm, model = adapter(), router_model()
    answers = ask(lm, "loglikelihood", *PAIRS)
    for (score, greedy), (context, continuation) in zip(answers, PAIRS, strict=True):
        stripped = context.rstrip(" ")
        whole, before = lm.tok_encode(context + continuation), lm.tok_encode(stripped)
        expected = plain_scores(model, before or [model.start], whole[len(before) :])
        assert score == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_rolling_covers_each_token_once():
    """Windows of a long text have the model's length, the last with all the context that fits."""
    lm, model = adapter(), router_model()
    tokens, length = lm.tok_encode(TEXTS[2]), model.config.model.max_len
    assert len(tokens) > 2 * length
    expected, done = plain_scores(model, [model.start], tokens[:length])[0], length
    while done < len(tokens):
        end = min(done + length, len(tokens))
        context = tokens[max(0, end - length - 1) : done]
        expected += plain_scores(model, context, tokens[done:end])[0]
        done = end
    scores = ask(lm, "loglikelihood_rolling", (TEXTS[2],), ("",))
    assert scores == [pytest.approx(expected, abs=1e-3), 0]


def test_a_continuation_that_merges_into_the_context_is_scored_by_itself():
    lm, model = adapter(), router_model()
    words = [model.tokenizer.decode([token]) for token in range(257, model.tokenizer.token_count)]
    word = next(w for w in words if len(w) > 1 and w.isalpha() and len(lm.tok_encode(w[:-1])) == 1)
    assert len(lm.tok_encode(word)) == 1
    ((score, _),) = ask(lm, "loglikelihood", (word[:-1], word[-1]))
    expected = plain_scores(model, *map(lm.tok_encode, (word[:-1], word[-1])))[0]
    assert score == pytest.approx(expected, abs=1e-4)


def test_a_context_of_spaces_is_an_empty_one():
    lm, model = adapter(), router_model()
    ((score, _),) = ask(lm, "loglikelihood", (" ", "the"))
    expected = plain_scores(model, [model.start], lm.tok_encode(" the"))[0]
    assert score == pytest.approx(expected, abs=1e-4)


def test_special_tokens_of_the_tokenizer_come_first():
    model, encode = router_model(), adapter().tok_encode
    lm = HarnessModel(dataclasses.replace(model, start=299, prefix=[299]))
    assert lm.tok_encode("the cat") == [299, *encode("the cat")]
    assert lm.tok_encode("the cat", add_special_tokens=False) == encode("the cat")
    ((score, _),) = ask(lm, "loglikelihood", ("the", " cat"))
    expected = plain_scores(model, [299, *encode("the")], encode(" cat"))[0]
    assert score == pytest.approx(expected, abs=1e-4)


def greedy_texts(prompts, n_tokens):
    """The likeliest texts after prompts, by full passes."""
    model = router_model()
    apply, params = jax.jit(model.decoder.apply), jax.device_get(model.params)
    rows = by_full_passes(lambda t: apply({"params": params}, t)[0], prompts, n_tokens, length=64)
    return [model.tokenizer.decode(row) for row in rows]


@pytest.mark.slow
def test_generation_ends_at_the_until_strings():
    lm, contexts = adapter(), ["the state of", "a cat sat on", "war"]
    texts = greedy_texts(map(lm.tok_encode, contexts), 12)
    settings = {"until": [], "max_gen_toks": 12}
    assert ask(lm, "generate_until", *((c, settings) for c in contexts)) == texts
    ends = [text[len(text) // 2 :][:2] for text in texts]
    requests = [
        (context, settings | {"until": [end, "never"]})
        for context, end in zip(contexts, ends, strict=True)
    ]
    expected = [text.split(end)[0] for text, end in zip(texts, ends, strict=True)]
    assert ask(lm, "generate_until", *requests) == expected
    assert all(len(short) < len(text) for short, text in zip(expected, texts, strict=True))


def test_long_contexts_lose_their_beginning():
    lm, context = adapter(), "the state of the union is a cat " * 9
    texts = ask(lm, "generate_until", (context, {"until": [], "max_gen_toks": 20}))
    assert texts == greedy_texts([lm.tok_encode(context)[-44:]], 20)


def test_sampling_repeats_itself():
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    requests = [(context, settings) for context in ("a", "a", "the")]
    first, again = (ask(adapter(), "generate_until", *requests) for _ in range(2))
    assert first == again and first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, r"with 64 more it is longer than .* model\.max_len=64"),
        ({"num_beams": 4}, r"the task asks to generate with \{'num_beams': 4\}"),
    ],
)
def test_refused_requests(settings, message):
    with pytest.raises(UserError, match=message):
        ask(adapter(), "generate_until", ("a", {"until": [], **settings}))

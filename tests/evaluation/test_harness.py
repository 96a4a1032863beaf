"""What lm-eval asks of the adapter, against plain passes, and against lm-eval's own `hf` backend
with the same weights.
"""

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
from tests.evaluation.models import make_config, make_model, plain_scores
from tests.evaluation.public_tasks import known_model

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


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


@functools.cache
def router_model():
    return make_model(make_config(experts__kind="router"))


@functools.cache
def adapter():
    return HarnessModel(router_model(), progress=False)


@functools.cache
def hf_backend(folder):
    """The same model, exported as Mixtral, as lm-eval loads it for users of `transformers`."""
    from lm_eval.models.huggingface import HFLM  # needs torch

    model = router_model()
    model.tokenizer.save(folder)
    values = to_json(model.config) | write_tokenizer(
        folder, folder / "model", model.config.model.max_len
    )
    write_model(folder / "model", values, *parameters_of(model.params, {}, "float32"))
    return HFLM(
        str(folder / "model"), backend="causal", device="cpu", dtype="float32", batch_size=4
    )


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_hf_backend(tmp_path):
    (tmp_path / "model").mkdir()
    requests = instances("loglikelihood", *PAIRS)
    ours, theirs = (lm.loglikelihood(requests) for lm in (adapter(), hf_backend(tmp_path)))
    np.testing.assert_allclose(
        [score for score, _ in ours], [score for score, _ in theirs], atol=1e-3
    )
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    requests = instances("loglikelihood_rolling", *((text,) for text in TEXTS))
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in (adapter(), hf_backend(tmp_path)))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_log_likelihoods_are_those_of_plain_passes():
    lm, model = adapter(), router_model()
    for (score, greedy), (context, continuation) in zip(
        lm.loglikelihood(instances("loglikelihood", *PAIRS)), PAIRS, strict=True
    ):
        stripped = context.rstrip(" ")
        whole, before = lm.tok_encode(context + continuation), lm.tok_encode(stripped)
        expected = plain_scores(model, before or [model.start], whole[len(before) :])
        assert score == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_rolling_covers_each_token_once():
    """A long text: windows of the model's length, the last with as much context as there is room
    for.
    """
    lm, model = adapter(), router_model()
    tokens, length = lm.tok_encode(TEXTS[2]), model.config.model.max_len
    assert len(tokens) > 2 * length
    expected, done = plain_scores(model, [model.start], tokens[:length])[0], length
    while done < len(tokens):
        end = min(done + length, len(tokens))
        expected += plain_scores(model, tokens[max(0, end - length - 1) : done], tokens[done:end])[
            0
        ]
        done = end
    (score,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (TEXTS[2],)))
    assert score == pytest.approx(expected, abs=1e-3)
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0]


@pytest.mark.smoke
def test_log_likelihoods_by_hand():
    """Of the model whose next byte depends on the last."""
    model, logits = known_model()
    logits = logits.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def by_hand(context, continuation):
        tokens = [int(t) for t in model.tokenizer.encode([context + continuation])[0]]
        n = len(continuation)
        return sum(log_probs[a, b] for a, b in zip(tokens[-n - 1 : -1], tokens[-n:], strict=True))

    pairs = [("faq", " yes"), ("Answer:", " Neither x"), ("q", " q q")]
    scores = HarnessModel(model, progress=False).loglikelihood(instances("loglikelihood", *pairs))
    assert [score for score, _ in scores] == pytest.approx(
        [by_hand(*pair) for pair in pairs], abs=1e-3
    )


def test_a_continuation_that_merges_into_the_context_is_scored_by_itself():
    lm, model = adapter(), router_model()
    words = [model.tokenizer.decode([token]) for token in range(257, model.tokenizer.token_count)]
    word = next(w for w in words if len(w) > 1 and w.isalpha() and len(lm.tok_encode(w[:-1])) == 1)
    assert len(lm.tok_encode(word)) == 1
    ((score, _),) = lm.loglikelihood(instances("loglikelihood", (word[:-1], word[-1])))
    assert score == pytest.approx(
        plain_scores(model, *map(lm.tok_encode, (word[:-1], word[-1])))[0], abs=1e-4
    )


def test_special_tokens_of_the_tokenizer_come_first():
    model = router_model()
    lm = HarnessModel(dataclasses.replace(model, start=299, prefix=[299]), progress=False)
    tokens = adapter().tok_encode("the cat")
    assert (
        lm.tok_encode("the cat") == [299, *tokens]
        and lm.tok_encode("the cat", add_special_tokens=False) == tokens
    )
    assert lm.loglikelihood(instances("loglikelihood", ("the", " cat")))[0][0] == pytest.approx(
        plain_scores(model, [299, *adapter().tok_encode("the")], adapter().tok_encode(" cat"))[0],
        abs=1e-4,
    )


def greedily(model, prompt, n):
    """The likeliest token, one plain pass a token."""
    row, params = list(prompt), jax.device_get(model.params)
    for _ in range(n):
        inputs = np.zeros((1, 64), np.int32)
        inputs[0, : len(row)] = row
        row.append(int(plain_logits(model.decoder)(params, inputs)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@functools.cache
def plain_logits(decoder):
    return jax.jit(lambda params, inputs: decoder.apply({"params": params}, inputs)[0])


@pytest.mark.slow
def test_generation_ends_at_the_until_strings():
    lm, model = adapter(), router_model()
    contexts = ["the state of", "a cat sat on", "war"]
    whole = [greedily(model, lm.tok_encode(context), 12) for context in contexts]
    texts = [model.tokenizer.decode(tokens) for tokens in whole]
    settings = {"until": [], "max_gen_toks": 12}
    assert (
        lm.generate_until(instances("generate_until", *((c, settings) for c in contexts))) == texts
    )
    ends = [text[len(text) // 2 :][:2] for text in texts]
    requests = [
        (c, {"until": [end, "never"], "max_gen_toks": 12})
        for c, end in zip(contexts, ends, strict=True)
    ]
    expected = [text.split(end)[0] for text, end in zip(texts, ends, strict=True)]
    assert lm.generate_until(instances("generate_until", *requests)) == expected
    assert all(len(short) < len(text) for short, text in zip(expected, texts, strict=True))


def test_long_contexts_lose_their_beginning():
    lm, model = adapter(), router_model()
    context = "the state of the union is a cat " * 9
    (text,) = lm.generate_until(
        instances("generate_until", (context, {"until": [], "max_gen_toks": 20}))
    )
    assert text == model.tokenizer.decode(greedily(model, lm.tok_encode(context)[-44:], 20))


def test_sampling_repeats_itself():
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    requests = instances("generate_until", *((context, settings) for context in ("a", "a", "the")))
    first = adapter().generate_until(requests)
    assert first == adapter().generate_until(requests) and first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, r"the task asks for 64 tokens; model\.max_len=64 must be larger"),
        ({"num_beams": 4}, r"the task asks to generate with \{'num_beams': 4\}"),
    ],
)
def test_what_cannot_be_generated(settings, message):
    with pytest.raises(UserError, match=message):
        adapter().generate_until(instances("generate_until", ("a", {"until": [], **settings})))

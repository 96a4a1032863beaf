"""The load of experts on any text."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aoe_jax.errors import UserError
from aoe_jax.evaluation.evaluate import TextTokens, evaluate_text, read_text
from tests.evaluation.models import WORDS, make_config, make_model, plain_scores

pytestmark = pytest.mark.usefixtures("ragged")


def load_of(model, inputs):
    features = jax.jit(partial(model.decoder.apply, method="features"))
    return np.asarray(features({"params": model.params}, inputs)[1].load)


def test_texts_are_seen_each_by_itself(tmp_path, capsys, monkeypatch):
    """Nll and loads are those of passes over single texts."""
    model = make_model(make_config(data__seq_len=64))
    monkeypatch.setattr("aoe_jax.evaluation.evaluate.load_model", lambda *_: model)
    monkeypatch.setattr("aoe_jax.evaluation.tasks.load_tasks", lambda *_, **__: None)
    monkeypatch.setattr("aoe_jax.evaluation.tasks.prompts", lambda *_: WORDS)
    report = evaluate_text(tmp_path, "task:words")
    assert json.loads((tmp_path / "text.json").read_text()) == report
    assert (tmp_path / "text.png").stat().st_size > 1000
    nll, loads, count = 0.0, 0.0, 0
    for tokens in model.tokenizer.encode(WORDS):
        tokens = [*tokens.tolist(), model.tokenizer.end_of_text]
        nll -= plain_scores(model, [model.start], tokens)[0]
        load = load_of(model, jnp.array([[model.start, *tokens[:-1]]]))
        loads, count = loads + load * len(tokens), count + len(tokens)
    assert (report["texts"], report["tokens"]) == (3, count)
    assert report["nll"] == pytest.approx(nll / count, abs=1e-5)
    of_bytes = nll / np.log(2) / sum(map(len, WORDS))
    assert report["bits_per_byte"] == pytest.approx(of_bytes, rel=1e-5)
    np.testing.assert_allclose(report["load_statistics"]["load"], loads / count, atol=1e-6)
    printed = capsys.readouterr().out
    assert f"task:words: 3 texts, {count} tokens, step 7" in printed and "Ent_load" in printed


def test_a_text_is_a_stream_of_tokens():
    tokenizer = make_model(make_config(experts__kind="dense")).tokenizer
    stream = TextTokens(["é", "a cat"], tokenizer)
    tokens = stream.read(0, len(stream)).tolist()
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text]
    assert ends[::2] == [0, len(tokens) - 1]
    assert tokenizer.decode(tokens) == "éa cat" and stream.text_bytes == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff", "is not UTF-8 at byte 0"), (b" \n", "is empty")],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_text("a cat\n\nsat")
    assert read_text(file) == "a cat\n\nsat"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"--text={file}: {message}"):
        read_text(file)

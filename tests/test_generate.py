"""The command `python -m aoe_jax.generate`."""

import itertools

import jax
import pytest

from aoe_jax.data.tokenised import open_corpus
from aoe_jax.errors import UserError
from aoe_jax.evaluation.generation import Generator, Sampling, continuations, text_sampler
from aoe_jax.evaluation.models import load_model
from tests.in_process import call
from tests.runs import finished_run, kind_config, run

pytestmark = pytest.mark.usefixtures("ragged")


def generate(*arguments):
    call("aoe_jax.generate", f"--workdir={finished_run()}", *arguments)


def test_texts_are_continued():
    arguments = ["--prompt=the state of", "--prompt=war and peace", "--max_tokens=12", "--seed=3"]
    command = ["-m", "aoe_jax.generate", f"--workdir={finished_run()}", *arguments]
    status, stdout, stderr = run(command)
    assert status == 0, stderr
    first, second = stdout.removesuffix("\n").split("\n\n")
    assert first.startswith("the state of") and second.startswith("war and peace")
    assert len(first) > len("the state of") and len(second) > len("war and peace")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_texts_only_grow():
    """Each text continues the text before, and the last texts are those of one large chunk."""
    model = load_model(finished_run())
    parts = list(continuations(model, ["the state of", ""], 20, chunk=3))
    for a, b in itertools.pairwise(parts):
        assert all(text.startswith(before) for before, text in zip(a, b, strict=True))
    assert parts[-1] == list(continuations(model, ["the state of", ""], 20, chunk=20))[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_contrast_changes_the_text(capsys):
    arguments = ["--prompt=the state of", "--max_tokens=20", "--temperature=0"]
    texts = []
    for own in ([], ["--contrast=5"]):
        generate(*arguments, *own)
        texts.append(capsys.readouterr().out)
    assert texts[1].startswith("the state of") and texts[0] != texts[1]


@pytest.mark.usefixtures("one_device")
def test_samples_in_training():
    """A sample continues 16 tokens of the validation split, with the weights that it is given."""
    model, change = load_model(finished_run()), lambda a: 1.5 * a
    corpus = open_corpus(model.config.data, model.config.model.vocab_size)
    (store,) = corpus.validation.values()
    sample = text_sampler(model.config, model.mesh, corpus)
    prompt = store.read(0, 16).tolist()
    (drawn,) = Generator(model).generate([prompt], 48, sampling=Sampling(temperature=0.8))
    for _ in range(2):
        text = sample(model.params, model.routing_state)
        assert text == model.tokenizer.decode(prompt + drawn)
    assert sample(jax.tree.map(change, model.params), model.routing_state) != text


def test_a_model_that_cannot_sample_in_training():
    config = kind_config("expert_choice", train__sample_every=5)
    corpus = open_corpus(config.data, config.model.vocab_size)
    with pytest.raises(UserError, match=r"train\.sample_every=5: .*cannot decode token by token"):
        text_sampler(config, None, corpus)


MISTAKES = [
    ([f"--prompt={'war ' * 60}"], r"prompt 0 has.*model\.max_len=64"),
    (["--max_tokens=0"], "--max_tokens=0"),
    (["--max_tokens=2147483647"], "with 2147483647 more it is longer"),
    (["--temperature=0", "--top_k=5"], "--top_k=5: has no effect with --temperature=0"),
    (["--temperature=-1"], "--temperature=-1"),
    (["--top_p=1.5"], r"--top_p=1\.5.* 1\.0"),
    (["--workdir=/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes(arguments, words):
    with pytest.raises(UserError, match=words):
        generate(*arguments)

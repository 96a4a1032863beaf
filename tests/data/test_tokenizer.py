import itertools
import json
import random
import signal
import threading

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from aoe_jax.data import tokenizer as data_tokenizer
from aoe_jax.data.corpora import speech_files
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    load_tokenizer,
    pieces,
    train_tokenizer,
)
from aoe_jax.errors import Interrupted, UserError
from tests.data.texts import LLAMA, texts

TEXTS = ["the cat sat on the mat", "the dog sat on the log"]
STRANGE = "\x00 \t\r\n Ünï©ødé 你好 🚀 don't 1790's  two\n\n three\u2003wide \u0301 end "


def encode(tokenizer, text):
    return tokenizer.encode([text])[0].tolist()


def test_trained_tokenizer(tmp_path):
    """It has the requested size and a token for every byte; training is deterministic."""
    tokenizer = train_tokenizer(TEXTS, 262)
    assert tokenizer.token_count == 262 and tokenizer.end_of_text == 0 and tokenizer.prefix == []
    assert tokenizer.decode(encode(tokenizer, STRANGE)) == STRANGE
    tokenizer.save(tmp_path)
    assert saved_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert encode(loaded, STRANGE) == encode(tokenizer, STRANGE)
    assert loaded.sha256 == tokenizer.sha256 == train_tokenizer(TEXTS, 262).sha256
    assert loaded.sha256 != train_tokenizer(TEXTS, 263).sha256
    assert 257 < train_tokenizer(TEXTS, 4096).token_count < 300  # no more pairs exist


def test_training_does_not_hold_up_signals():
    """The library trains in another thread, because it does not check for signals."""
    handled = threading.Event()

    def documents():
        yield from TEXTS
        handled.wait(60)

    def handler(number, frame):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted("now")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(Interrupted):
            train_tokenizer(documents(), 300)
    finally:
        handled.set()
        signal.signal(signal.SIGALRM, before)


def trained(tmp_path, change=lambda spec: None, vocab_size=2000):
    """Trains a tokenizer.json on two addresses, changes it, and returns its path."""
    train_tokenizer([file.read_text() for file in speech_files()[-2:]], vocab_size).save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path / "tokenizer.json"


def by_the_library(path, documents):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return [
        encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)
    ]


def test_byte_level_bpe_is_as_the_library_gives_it(tmp_path):
    path = trained(tmp_path)
    tokenizer = load_tokenizer(path)
    choice = random.Random(0)
    alphabet = [*"ethanos  \n\t\r'\"sdmrvl019.,-é好\u2003\u0301\x85ſ🚀\u200d"]
    noise = ["".join(choice.choices(alphabet, k=300)) for _ in range(50)]
    documents = [STRANGE, "", " ", "<|endoftext|>", *noise, *texts(100)]
    assert [ids.tolist() for ids in tokenizer.encode(documents)] == by_the_library(path, documents)


def test_dropout_truncation_and_padding_of_a_file_are_off(tmp_path):
    path = trained(tmp_path)
    text = "the state of the Union " * 20
    (expected,) = by_the_library(path, [text])
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.model.dropout = 0.5
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=800)
    tokenizer.save(str(path))
    assert encode(load_tokenizer(path), text) == expected


@pytest.mark.parametrize(
    ("vocabulary", "special", "end_of_text", "token_count"),
    [
        ({"a": 0, "b": 5}, "<|endoftext|>", 2, 6),
        ({"a": 0, "b": 5}, "<|end_of_text|>", 2, 6),
        ({"</s>": 0, "b": 5}, None, 0, 6),
        ({"a": 0, "</s>": 1}, "<eos>", 2, 3),  # in Gemma, </s> is an ordinary token of HTML
    ],
)
def test_end_of_text(vocabulary, special, end_of_text, token_count):
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if special:
        tokenizer.add_special_tokens([special])
    found = HuggingFaceTokenizer(tokenizer.to_str())
    assert (found.end_of_text, found.token_count) == (end_of_text, token_count)
    assert found.end_name == (special or "</s>")


def test_any_hugging_face_tokenizer(tmp_path):
    """The example is a unigram model with a metaspace, the kind of T5's tokenizer."""
    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefgh")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "any.json"))
    loaded = load_tokenizer(tmp_path / "any.json")
    assert loaded.token_count == 11 and loaded.end_of_text == 0
    assert loaded.decode(encode(loaded, "bad cab")) == "bad cab"
    assert 0 in by_the_library(tmp_path / "any.json", ["ab</s>c"])[0]
    assert 0 not in encode(loaded, "ab</s>c </s>")
    assert encode(loaded, "ab</s>c") == [*encode(loaded, "ab</"), *encode(loaded, "s>c")]
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "any.json").read_bytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_sentencepiece(tmp_path, threads):
    tokenizer = load_tokenizer(LLAMA, threads)
    assert (tokenizer.token_count, tokenizer.end_of_text) == (32000, 2)
    documents = [STRANGE.replace("\x00", ""), "", "a </s> <s> b", *texts(50)]
    documents.append(speech_files()[0].read_text())
    encoded = tokenizer.encode(documents)
    assert list(map(tokenizer.decode, encoded)) == documents
    assert not np.isin([1, 2], np.concatenate(encoded)).any()
    library = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA))
    assert [ids.tolist() for ids in encoded] == library.encode(documents)
    tokenizer.save(tmp_path)
    assert saved_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256
    assert tokenizer.decode([2, *encoded[3], 2]) == documents[3]
    # A model may have more tokens than its tokenizer.
    assert tokenizer.decode([*encoded[3], np.uint32(32000), 32063]) == documents[3]


def test_sentencepiece_without_an_end(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "small"),
        vocab_size=16,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"'.*small.model': has no end-of-sentence piece; give"):
        load_tokenizer(tmp_path / "small.model")


@pytest.mark.parametrize(("size", "words"), [(256, "at least 257"), (2**31 - 1, "at most 1677")])
def test_vocabularies_that_cannot_be_trained(size, words):
    with pytest.raises(UserError, match=rf"model.vocab_size={size}: .*{words}"):
        train_tokenizer(TEXTS, size)


@pytest.mark.parametrize("content", [None, b"{}", b"{", b"no model", b"", bytes(range(256))])
def test_files_that_are_no_tokenizers(tmp_path, content):
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    problem = "is no tokenizer" if content is not None else "cannot be read"
    words = rf"--tokenizer='.*bad': {problem} \(.*\); give the path of a Hugging"
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path / "bad", setting="--tokenizer")


def test_special_tokens_before_each_text(tmp_path):
    """The tokenizer knows these tokens, but does not add them when it encodes a text."""
    plain, file = train_tokenizer(TEXTS, 262), tmp_path / "changed.json"
    plain.save(tmp_path)
    changed = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    changed.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    changed.save(str(file))
    tokenizer = load_tokenizer(file)
    assert tokenizer.prefix == [0] and encode(tokenizer, "the cat") == encode(plain, "the cat")
    assert tokenizer.identity == plain.identity != train_tokenizer(TEXTS, 263).identity


def test_pieces_of_a_text_have_its_tokens(tmp_path):
    """The tokens of pieces that end with a word are those of the text. All tokens decode to it."""
    choice = random.Random(0)
    parts = [*" \n\t.1'\x1c\u2003好", "  ", " \n", "\r\n", "'s", "Ab"]
    tokenizer = load_tokenizer(trained(tmp_path, vocab_size=600))
    for _ in range(20):
        text = "".join(choice.choices(parts, k=3000)) + " the end" * 100
        for size in (7, 100, 2000, 10**6):
            found = list(pieces(text, size))
            assert "".join(found) == text and max(map(len, found)) <= size
            tokens = np.concatenate(tokenizer.encode(found)).tolist()
            are_words = all(
                not a[-1].isspace() and b[0] in " \n" for a, b in itertools.pairwise(found)
            )
            assert tokens == encode(tokenizer, text) or not are_words
            assert tokenizer.decode(tokens) == text


def test_a_document_counts_with_its_beginning_in_training(monkeypatch):
    monkeypatch.setattr(data_tokenizer, "TRAINING_CHARACTERS", 40)
    monkeypatch.setattr(data_tokenizer, "_TRAINING_PIECE", 15)
    text = "the cat sat on the mat and on other mats"
    assert len(text) == 40
    long = train_tokenizer([text + " words of others" * 1000], 300)
    assert long.sha256 == train_tokenizer([text], 300).sha256


def test_a_library_that_panics(tmp_path):
    path = trained(
        tmp_path, lambda spec: spec["model"].update(continuing_subword_prefix="x" * 99), 300
    )
    with pytest.raises(UserError, match=r"data\.tokenizer='.*tokenizer\.json': is no tokenizer"):
        load_tokenizer(path)

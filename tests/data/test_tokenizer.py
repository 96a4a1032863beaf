import pytest
from tokenizers import Tokenizer, models

from aoe_jax.data.tokenizer import check_vocab_size, end_of_text_id, load_tokenizer, token_count, train_tokenizer
from aoe_jax.errors import UserError

TEXTS = ["the cat sat on the mat", "the dog sat on the log"]


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_trained_tokenizer_has_the_size_asked_for_and_every_byte(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 262)
    assert token_count(tokenizer) == 262
    assert tokenizer.token_to_id("<|endoftext|>") == end_of_text_id(tokenizer) == 0
    text = "\x00 \t\r\n Ünï©ødé 你好 🚀 the cat"
    assert tokenizer.decode(encode(tokenizer, text)) == text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path / "tokenizer.json"), text) == encode(tokenizer, text)


def test_small_corpus_gives_a_smaller_vocabulary():
    assert 257 < token_count(train_tokenizer(TEXTS, 4096)) < 300


def test_training_repeats_itself():
    assert train_tokenizer(TEXTS, 280).to_str() == train_tokenizer(TEXTS, 280).to_str()


def test_the_name_of_a_special_token_in_a_document_is_text():
    tokenizer = train_tokenizer(TEXTS, 257)
    assert 0 not in encode(tokenizer, "a <|endoftext|> b")


def test_loaded_tokenizer_encodes_whole_documents(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 257)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(encode(load_tokenizer(tmp_path / "tokenizer.json"), "twelve bytes")) == 12


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_end_of_text_names(name):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    with pytest.raises(UserError, match=r"data.tokenizer.*end-of-text"):
        end_of_text_id(tokenizer)
    tokenizer.add_special_tokens([name])
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(name)


def test_token_count_heeds_gaps():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    assert token_count(tokenizer) == 6
    check_vocab_size(tokenizer, 6)
    with pytest.raises(UserError, match=r"model.vocab_size=5: the tokenizer has 6 tokens"):
        check_vocab_size(tokenizer, 5)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"model.vocab_size=256: must be at least 257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match=r"data.tokenizer='.*none.json': no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer='.*bad.json': not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")

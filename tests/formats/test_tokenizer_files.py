"""With the tokenizer of an exported model, transformers gives the same tokens as here."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import processors

from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.data.tokenizer import load_tokenizer, train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.formats.tokenizer_files import read_prefix, write_tokenizer
from tests.data.texts import texts

STRANGE = "the state  of\n the union, Ünï 好 don't "


def byte_level(folder):
    train_tokenizer(texts(50), 400).save(folder)


def with_a_first_token(folder):
    """Like many tokenizers of the hub, it begins every text with a token."""
    byte_level(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A {end}", special_tokens=[(end, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def sentencepiece_of(kind):
    def train(folder):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts(50)),
            model_writer=model,
            vocab_size=400,
            model_type=kind,
            byte_fallback=True,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())

    return train


TOKENIZERS = {
    "byte-level BPE": byte_level,
    "with a first token": with_a_first_token,
    "SentencePiece BPE": sentencepiece_of("bpe"),
    "SentencePiece unigram": sentencepiece_of("unigram"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_gives_the_same_tokens(tmp_path, name):
    import transformers  # of the development extra, on Python 3.11 only

    folder, output = tmp_path / "run", tmp_path / "model"
    folder.mkdir()
    output.mkdir()
    TOKENIZERS[name](folder)
    ids = write_tokenizer(folder, output, 64)
    (output / "config.json").write_text(json.dumps({"model_type": "mixtral", **ids}))
    ours = load_tokenizer(saved_tokenizer(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    expected = [tokens.tolist() for tokens in ours.encode([STRANGE, *texts(3)])]
    assert theirs([STRANGE, *texts(3)])["input_ids"] == expected
    again = load_tokenizer(saved_tokenizer(output))
    assert [tokens.tolist() for tokens in again.encode([STRANGE, *texts(3)])] == expected
    assert theirs.eos_token_id == ours.end_of_text == ids["eos_token_id"]
    assert theirs.convert_ids_to_tokens(ours.end_of_text) == ours.end_name
    assert theirs.bos_token_id is None and theirs.model_max_length == 64
    unchanged = saved_tokenizer(output).read_bytes() == saved_tokenizer(folder).read_bytes()
    assert unchanged == (name != "with a first token")


@pytest.mark.slow
@pytest.mark.parametrize("adds", [None, True, False])
def test_the_token_before_a_text_is_that_of_transformers(tmp_path, adds):
    """Old models of the hub have a SentencePiece model alone."""
    import transformers

    sentencepiece_of("bpe")(tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "LlamaTokenizer"}
    settings |= {} if adds is None else {"add_bos_token": adds}
    config = {"model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_tokenizer(saved_tokenizer(tmp_path))
    prefix = read_prefix(tmp_path, ours, 1)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(STRANGE)["input_ids"] == prefix + ours.encode([STRANGE])[0].tolist()
    assert prefix == ([1] if adds else [])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        read_prefix(tmp_path, ours, 1)


def test_only_the_files_of_a_tokenizer_are_copied(tmp_path):
    """Among the files of a model there may be a secret, such as an access token."""
    folder, output = tmp_path / "model", tmp_path / "converted"
    folder.mkdir()
    output.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral", "eos_token_id": 1}')
    needed = {"tokenizer.json", "special_tokens_map.json", "chat_template.jinja"}
    for name in needed | {"token.json", "access_tokens.json"}:
        (folder / name).write_text("{}")
    assert write_tokenizer(folder, output, 64)["eos_token_id"] == 1
    assert {path.name for path in output.iterdir()} == needed

"""Tokenizers: byte-level BPE trained on the corpus, or a Hugging Face `tokenizer.json`."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aoe_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>")
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE; token 0 is `<|endoftext|>` and every byte has a token.

    The vocabulary is smaller than `vocab_size` if the documents do not hold enough pairs to merge.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"model.vocab_size={vocab_size}: must be at least {_SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _for_plain_text(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face `tokenizer.json`.

    Raises:
        UserError: the file is missing or is no tokenizer.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"data.tokenizer={str(path)!r}: no such file; give the path of a Hugging Face tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer={str(path)!r}: not a Hugging Face tokenizer.json ({error})") from error
    return _for_plain_text(tokenizer)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that separates documents.

    Raises:
        UserError: the vocabulary has none of `<|endoftext|>`, `</s>`, `<|end_of_text|>`.
    """
    for name in _END_OF_TEXT_NAMES:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise UserError(f"data.tokenizer: has no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)}")


def token_count(tokenizer: Tokenizer) -> int:
    """Smallest `vocab_size` of a model for this tokenizer: its largest token id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` if a model with `vocab_size` lacks an embedding for some token."""
    if vocab_size < token_count(tokenizer):
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokenizer has {token_count(tokenizer)} tokens; set it to at least that"
        )


def _for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Encode whole documents, and the name of a special token in a document as ordinary text."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

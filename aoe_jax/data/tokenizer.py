"""Tokenizers: byte-level BPE trained on the corpus, a Hugging Face `tokenizer.json`, or a
SentencePiece model.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aoe_jax.config.checks import require
from aoe_jax.data.token_store import saved_tokenizer
from aoe_jax.errors import UserError, naming
from aoe_jax.storage.files import read_bytes, write_whole
from aoe_jax.storage.paths import FILE_BYTES, parsed_path
from aoe_jax.storage.retry import patiently, refusing

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
_END_OF_TEXT_NAMES += ("<｜end▁of▁sentence｜>", "[SEP]")
MOST_TOKENS = 2**24
PIECE_CHARACTERS = 2**21  # length limit of a text that is tokenised at once
TRAINING_CHARACTERS = 2**24  # BPE is trained on at most this many characters of a document
_TRAINING_PIECE = 2**16
_TO_THE_LAST_WORD = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts a text into pieces of at most `size` characters, if possible before a space or a line
    break that follows a word.

    The memory use of tokenizer libraries is up to 100 times the size of a text. If every cut is
    before such a space or line break, byte-level BPE with the pre-tokenizer of GPT-2 returns the
    same tokens for the pieces as for the whole text. Other tokenizers may return different
    tokens, or one more token, at a cut.
    """
    start = 0
    while len(text) - start > size:
        words = _TO_THE_LAST_WORD.match(text, start, start + size)
        stop = words.end() if words else start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


@contextlib.contextmanager
def _refusing(problem: str, cure: str) -> Iterator[None]:
    """Turns every exception of a tokenizer library except `MemoryError` into `UserError`. The
    libraries have no exception type for bad input: `tokenizers` raises `Exception` itself, and
    `sentencepiece` raises `RuntimeError` and others.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # The class of a Rust library's panic cannot be imported, so it is recognised by its name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{problem} ({reason}); {cure}") from error


class Tokenizer:
    """Converts documents to token ids and back. The name of a special token in a document, such as
    `</s>`, is encoded as ordinary text.
    """

    file_name: ClassVar[str]  # the name of its file, `tokenizer.json` or `tokenizer.model`
    end_of_text: int  # id of the token that separates documents
    end_name: str  # the name of that token
    token_count: int  # the largest token id plus one, the smallest `vocab_size` of a model
    sha256: str  # the hash of the file
    prefix: list[int]  # ids of special tokens before each text, such as `<s>`; `encode` omits them

    def __init__(self, content: bytes, threads: int | None):
        """`content` is the file's content. `encode` uses `threads` threads; None: one per core."""
        self._content, self._threads = content, threads or -1  # -1: SentencePiece uses all cores
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    def identity(self) -> str:
        """A hash that is equal for tokenizers that encode every text alike."""
        return self.sha256

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each text, uint32 `[tokens]`, without special tokens. Callers
        first cut long texts into `pieces`. Raises `UserError` if the tokenizer fails.
        """
        with _refusing("the tokenizer cannot encode a text", "use another one"):
            return self._encode(texts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids. Special tokens and unknown ids add no text. Raises
        `UserError` if the tokenizer fails.
        """
        with _refusing("the tokenizer cannot decode tokens", "use another one"):
            return self._decode(tokens)

    def save(self, folder: Path):
        """Writes the tokenizer to `folder / file_name`, completely or not at all."""
        write_whole(folder / self.file_name, self._content)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    file_name = "tokenizer.json"

    def __init__(self, content: str, threads: int | None = None):
        """Raises `UserError` without an end-of-text token. Library errors are not caught."""
        super().__init__(content.encode(), threads)
        self._tokenizer = tokenizer = tokenizers.Tokenizer.from_str(content)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if hasattr(tokenizer.model, "dropout"):  # BPE dropout would make tokens random
            tokenizer.model.dropout = None
        if threads == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.token_count = max(vocabulary.values(), default=-1) + 1
        ends = [name for name in _END_OF_TEXT_NAMES if name in vocabulary]
        if not ends:
            raise UserError(f"has no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)}")
        # Special tokens are preferred, because </s> can also be an ordinary token from HTML.
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self.end_name = next((name for name in ends if name in special), ends[0])
        self.end_of_text = vocabulary[self.end_name]
        example = tokenizer.encode("a")
        is_prefix = itertools.takewhile(bool, example.special_tokens_mask)
        self.prefix = example.ids[: sum(is_prefix)]

    @property
    def identity(self) -> str:
        # Other fields, such as the post-processor, only add or remove special tokens.
        spec, names = json.loads(self._content), "added_tokens normalizer pre_tokenizer model"
        fields = [spec.get(name) for name in names.split()]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        half = len(self.end_name) // 2
        start, rest = (re.escape(part) for part in (self.end_name[:half], self.end_name[half:]))
        for i, ids in enumerate(found):
            # Some models still encode the name of the end-of-text token as that token. Encoding the
            # two halves of the name separately makes it ordinary text.
            if self.end_of_text in ids:
                parts = re.split(f"(?<={start})(?={rest})", texts[i])
                encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
                found[i] = np.concatenate([np.array(part.ids, np.uint32) for part in encodings])
        return found

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, threads: int | None = None):
        """Raises `UserError` without an end-of-sentence piece. Library errors are not caught."""
        if not model:
            raise RuntimeError("it is empty")
        super().__init__(model, threads)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.end_of_text = self._processor.eos_id()
        if self.end_of_text < 0:
            raise UserError("has no end-of-sentence piece; give a model that has one")
        self.end_name = self._processor.id_to_piece(self.end_of_text)
        self.token_count = self._processor.get_piece_size()
        self.prefix = []

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._processor.encode(list(texts), num_threads=self._threads)
        return [np.array(ids, np.uint32) for ids in encoded]

    def _decode(self, tokens: Sequence[int]) -> str:
        known = [token for token in map(int, tokens) if token < self.token_count]
        return self._processor.decode([t for t in known if not self._processor.is_control(t)])


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE. Token 0 is `<|endoftext|>`, and every byte is a token.

    Only the first `TRAINING_CHARACTERS` characters of a document are used. The vocabulary is
    smaller than `vocab_size` if the documents have too few pairs to merge. Raises `UserError` if
    `vocab_size` is below 257 or above `MOST_TOKENS`.
    """
    wanted = f"must be at least 257 (256 bytes and {END_OF_TEXT}) and at most {MOST_TOKENS}"
    require(257 <= vocab_size <= MOST_TOKENS, "model.vocab_size", vocab_size, wanted)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = (pieces(text[:TRAINING_CHARACTERS], _TRAINING_PIECE) for text in documents)
    texts = itertools.chain.from_iterable(sample)
    # Trains in another thread, so that Python can handle signals during the training.
    ThreadPoolExecutor(1).submit(tokenizer.train_from_iterator, texts, trainer).result()
    return HuggingFaceTokenizer(tokenizer.to_str(pretty=True))


def load_tokenizer(
    path: str | Path, threads: int | None = None, setting: str = "data.tokenizer"
) -> Tokenizer:
    """Loads a Hugging Face `tokenizer.json` or a SentencePiece model, from a file of any name or
    from a folder with a file of the usual name.

    `encode` uses `threads` threads, by default one per core. Raises `UserError`, which names the
    `setting`, if the file is missing, is no tokenizer, or has no end-of-text token.
    """
    path = parsed_path(path, setting, in_store=True)
    if path.is_dir():
        path = saved_tokenizer(path)
    wanted = "give the path of a Hugging Face tokenizer.json or a SentencePiece model"
    wanted += ", or bpe:N" if setting == "--tokenizer" else ""
    what = f"{setting}={str(path)!r}: cannot be read"
    with refusing(what, f"; {wanted}"):
        content = patiently(what, lambda: read_bytes(path, FILE_BYTES))
    with naming(f"{setting}={str(path)!r}"), _refusing("is no tokenizer", wanted):
        if content[:1] == b"{":
            return HuggingFaceTokenizer(content.decode(), threads)
        return SentencePieceTokenizer(content, threads)

"""Tokenizers: byte-level BPE trained on the corpus, a Hugging Face `tokenizer.json`, or a
SentencePiece model.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aoe_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """Turns whole documents into token ids and back; the name of a special token in a document is
    ordinary text.

    Attributes:
        file_name: what the file of this kind of tokenizer is called: `tokenizer.json` or
          `tokenizer.model`.
        end_of_text: id of the token that separates documents.
        end_name: its name.
        token_count: smallest `vocab_size` of a model for this tokenizer, its largest token id plus
          one.
        sha256: of the file, which tells tokenizers apart.
        prefix: ids of the special tokens that the file has before each text, such as `<s>`; often
          none.
    """

    file_name: ClassVar[str]
    end_of_text: int
    end_name: str
    token_count: int
    sha256: str
    prefix: list[int]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, integer arrays `[tokens]`, without any special token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""

    def save(self, folder: Path):
        """Write the tokenizer to `folder / file_name`."""


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library."""

    file_name = "tokenizer.json"

    def __init__(self, content: str, threads: int | None = None):
        """Take the text of a file; raise `UserError` if the vocabulary has no end-of-text token.

        `threads` is as in `load_tokenizer`; what isn't a tokenizer raises `Exception`, as the
        library has it.
        """
        tokenizer = tokenizers.Tokenizer.from_str(content)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if threads == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._content, self._tokenizer, self._threads = content, tokenizer, threads
        self._tiktoken = _as_tiktoken(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.end_name = next((name for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        if self.end_name is None:
            raise UserError(f"has no end-of-text token; add one of {', '.join(_END_OF_TEXT_NAMES)}")
        self.end_of_text = vocabulary[self.end_name]
        self.token_count = max(vocabulary.values()) + 1
        example = tokenizer.encode("a")
        is_prefix = itertools.takewhile(bool, example.special_tokens_mask)
        self.prefix = example.ids[: sum(is_prefix)]
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As in `Tokenizer`."""
        if not self._tiktoken:
            return self._encode_by_tokenizers(texts)
        if self._threads == 1:
            return list(map(self._encode_by_tiktoken, texts))
        with ThreadPoolExecutor(self._threads or cores()) as pool:
            return list(pool.map(self._encode_by_tiktoken, texts))

    def decode(self, tokens: Sequence[int]) -> str:
        """As in `Tokenizer`."""
        return self._tokenizer.decode(tokens)

    def save(self, folder: Path):
        """As in `Tokenizer`."""
        (folder / self.file_name).write_bytes(self._content.encode())

    def _encode_by_tokenizers(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self._encode_around_the_end(text)
            if self.end_of_text in encoding.ids
            else np.array(encoding.ids, np.uint32)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _encode_around_the_end(self, text: str) -> np.ndarray:
        """Of a text that has the name of the end-of-text token, which some models take for that
        whatever they are told.
        """
        half = len(self.end_name) // 2
        start, rest = (re.escape(part) for part in (self.end_name[:half], self.end_name[half:]))
        parts = re.split(f"(?<={start})(?={rest})", text)
        encodings = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, np.uint32) for encoding in encodings])

    def _encode_by_tiktoken(self, text: str) -> np.ndarray:
        try:
            return self._tiktoken.encode_to_numpy(text)
        except ValueError:  # its regular expressions give up at about a million blanks in a row
            return self._encode_by_tokenizers([text])[0]


class SentencePieceTokenizer:
    """A SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, threads: int | None = None):
        """Raise `UserError` if the model has no end-of-sentence piece, `RuntimeError` if these
        bytes are no model.
        """
        if not model:
            raise RuntimeError("it is empty")
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model, self._threads = model, threads
        self.end_of_text = self._processor.eos_id()
        if self.end_of_text < 0:
            raise UserError("has no end-of-sentence piece; give a model that has")
        self.end_name = self._processor.id_to_piece(self.end_of_text)
        self.token_count = self._processor.get_piece_size()
        self.prefix = []
        self.sha256 = hashlib.sha256(model).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As in `Tokenizer`."""
        encoded = self._processor.encode(list(texts), num_threads=self._threads or cores())
        return [np.array(ids, np.uint32) for ids in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """As in `Tokenizer`."""
        return self._processor.decode(
            [int(token) for token in tokens if not self._processor.is_control(int(token))]
        )

    def save(self, folder: Path):
        """As in `Tokenizer`."""
        (folder / self.file_name).write_bytes(self._model)


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
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str(pretty=True))


def load_tokenizer(
    path: str | Path, threads: int | None = None, setting: str = "data.tokenizer"
) -> Tokenizer:
    """Load a Hugging Face `tokenizer.json` or a SentencePiece model, whatever the file is called.

    Args:
        path: of the file.
        threads: that `encode` runs on; None: as many as there are cores.
        setting: what errors call the path.

    Raises:
        UserError: the file is missing, is no tokenizer, or has no token for the end of a text.
    """
    path = Path(path).expanduser()
    wanted = "give the path of a Hugging Face tokenizer.json or a SentencePiece model"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{setting}={str(path)!r}: can't be read ({error.strerror}); {wanted}"
        ) from error
    try:
        if content[:1] == b"{":
            return HuggingFaceTokenizer(content.decode(), threads)
        return SentencePieceTokenizer(content, threads)
    except UserError as error:
        raise UserError(f"{setting}={str(path)!r}: {error}") from error
    except Exception as error:  # the libraries raise bare Exception, RuntimeError and others
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}={str(path)!r}: is no tokenizer ({reason}); {wanted}") from error


def saved_tokenizer(folder: Path) -> Path:
    """The file of the tokenizer that was saved in a folder; the first of the possible names if
    there is none.
    """
    names = [kind.file_name for kind in (HuggingFaceTokenizer, SentencePieceTokenizer)]
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` if a model with `vocab_size` lacks an embedding for some token."""
    if vocab_size < tokenizer.token_count:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokenizer has {tokenizer.token_count} tokens; set it to at least that"
        )


def _as_tiktoken(tokenizer: tokenizers.Tokenizer) -> tiktoken.Encoding | None:
    """The same tokenizer in the tiktoken library, which is several times as fast; None unless it is
    sure to be the same.

    tiktoken joins the neighbours whose union has the lowest id; the tokenizers library those that
    come first in its list of merges. These are the same if the merges stand in the order of the ids
    they make, each another, and the text of every token is encoded to that token. For let x, y be
    neighbours that are no merge and z their union, a token: up to here the text of z has been
    joined as it would be alone, and alone it would end as x, y.
    """
    spec = json.loads(tokenizer.to_str())
    model, split = spec["model"], spec["pre_tokenizer"] or {}
    unusual = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
    )
    unusual += ("ignore_merges",)  # takes whole words as they are, so their text would say nothing
    if (
        spec["normalizer"] is not None
        or model["type"] != "BPE"
        or any(model.get(name) for name in unusual)
        or (split.get("type"), split.get("add_prefix_space"), split.get("use_regex"))
        != ("ByteLevel", False, True)
        or not all(token["special"] for token in spec["added_tokens"])
    ):
        return None
    added = {token["content"] for token in spec["added_tokens"]}
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in added}
    made = [vocabulary.get("".join(merge), -1) for merge in model["merges"]]
    spelled = _bytes_of_letters()
    if (
        not spelled.keys() <= vocabulary.keys()
        or not spelled.keys() >= set("".join(vocabulary))
        or min(made, default=0) < 0
        or any(a >= b for a, b in itertools.pairwise(made))
    ):
        return None
    alone = tokenizers.Tokenizer.from_str(
        json.dumps(spec | {"pre_tokenizer": None, "added_tokens": []})
    )
    encodings = alone.encode_batch_fast(list(vocabulary), add_special_tokens=False)
    if any(
        encoding.ids != [id] for encoding, id in zip(encodings, vocabulary.values(), strict=True)
    ):
        return None
    ranks = {bytes(spelled[letter] for letter in token): id for token, id in vocabulary.items()}
    return tiktoken.Encoding(
        "byte-level BPE", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for: printable ones for themselves, others
    from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

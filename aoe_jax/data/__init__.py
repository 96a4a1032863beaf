"""Text as token streams: corpora, tokenizers, stores of tokens, and batches of packed windows."""

SPLITS = ("train", "validation", "test")

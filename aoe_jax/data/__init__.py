"""Text as token streams: corpora, tokenizers, stores of tokens, and batches of packed windows."""

SPLITS = ("train", "validation", "test")
DOCUMENT_BYTES = 2**29  # the largest document, and the longest line of JSON

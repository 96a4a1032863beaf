"""Turns text into batches of tokens: corpora, tokenizers, token stores and packed windows."""

SPLITS = ("train", "validation", "test")
DOCUMENT_BYTES = 2**29  # size limit of a document and of a line of JSON, in bytes

"""Text as token streams: corpora, tokenizers, stores of tokens, and batches of packed windows."""

SPLITS = ("train", "validation", "test")
DOCUMENT_BYTES = 2**29  # size limit of a document and of a line of JSON, in bytes

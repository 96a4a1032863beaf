import subprocess
import sys

from aoe_jax.data import corpora as sotu
from aoe_jax.data.corpora import load_corpus


def test_splits_are_by_document_and_stratified_over_time(sotu_cache, sotu_directory):
    builder = sotu.Sotu(data_dir=str(sotu_cache / "tfds"), file_format="array_record")
    ids = {
        split: [row["id"].decode() for row in builder.as_data_source(split=split)]
        for split in builder.info.splits
    }
    assert {split: len(names) for split, names in ids.items()} == {
        "train": 225,
        "validation": 12,
        "test": 12,
    }
    chronological = sorted(name for names in ids.values() for name in names)
    assert len(set(chronological)) == 249
    assert chronological[0].startswith("1790") and chronological[-1].startswith("2026")
    assert sorted(ids["validation"]) == chronological[9::20]
    assert sorted(ids["test"]) == chronological[19::20]


def test_text_is_that_of_the_package(sotu_cache, sotu_directory):
    texts = {path.read_bytes().decode() for path in sotu.speech_files()}
    corpus = load_corpus("sotu", None, str(sotu_cache))
    assert {
        text for split in ("train", "validation", "test") for text in corpus.documents(split)
    } == texts


def test_it_needs_neither_tensorflow_nor_pandas(tmp_path):
    code = (
        "import sys; from aoe_jax.data.corpora import load_corpus;"
        f"assert len(list(load_corpus('sotu', None, {str(tmp_path)!r}).documents('test'))) == 12;"
        "assert not {'tensorflow', 'pandas'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ""

"""Runs on several corpora: the order of windows, the shared tokenizer, and the run's identity."""

import itertools
import json
import shutil
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from aoe_jax.config.data import DataConfig
from aoe_jax.config.run import Config
from aoe_jax.data import SPLITS, token_store
from aoe_jax.data.pipeline import Mixture, train_batches
from aoe_jax.data.tokenised import open_corpus, with_vocabulary
from aoe_jax.errors import UserError
from tests.runs import damage

SEQ_LEN, BATCH_SIZE = 16, 6


def write_documents(folder, letters, count=12, length=400):
    """Writes documents of these letters, so that the letters of a window show its corpus."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        (folder / f"{i:02d}.txt").write_text("".join(random.choice(list(letters), length)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    return {
        "small": write_documents(root / "small", "abc", count=5),
        "large": write_documents(root / "large", "xyz"),
        "digits": write_documents(root / "digits", "012"),
        "cache": root / "cache",
    }


def corpus_of(folders, name, vocab_size=257, **settings):
    name = name.format(**{key: str(folder) for key, folder in folders.items()})
    return open_corpus(DataConfig(name, cache=str(folders["cache"]), **settings), vocab_size)


@pytest.fixture(scope="module")
def corpus(folders):
    return corpus_of(folders, "text@{small}=0.5, text@{large}=0.2, text@{digits}=0.3")


def batches_of(corpus, weights="as configured", rows=None):
    weights = corpus.weights if weights == "as configured" else weights
    return train_batches(corpus.train, weights, SEQ_LEN, BATCH_SIZE, 7, rows)


def sources_of(corpus, batch):
    """The name of the source of each row of a batch."""
    ids = {name: set(store.read(0, len(store)).tolist()) for name, store in corpus.train.items()}
    shared = set.intersection(*ids.values())  # the end-of-text token
    return [
        next(name for name in ids if set(row) - shared <= ids[name])
        for row in batch["inputs"].tolist()
    ]


WEIGHTS = [
    [Fraction(1)],
    [Fraction("0.67"), Fraction("0.045"), Fraction("0.285")],
    [7, 1, 1, 5],
    [1, 10**6],
    [Fraction(1, 3), Fraction(1, 7)],
    list(range(1, 60)),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 987_654_321_987_654])
def test_shares_are_kept_at_every_position(weights, start):
    mixture, total = Mixture(weights), sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    counts = mixture.counts(start)
    assert sum(counts) == start
    for position in range(start, start + 500):
        source, index = mixture[position]
        assert index == counts[source]
        counts[source] += 1
        assert mixture.counts(position + 1) == counts
        if position % 50 == 0:
            for share, count in zip(shares, counts, strict=True):
                assert abs(count - (position + 1) * share) < 1 + np.log(len(weights))


def test_shares_are_exact_where_they_can_be():
    assert Mixture(WEIGHTS[1]).counts(200) == [134, 9, 57]
    assert Mixture([31, 4159, 26]).counts(31 + 4159 + 26) == [31, 4159, 26]


def test_batches_hold_the_sources_in_their_shares(corpus):
    iterator = iter(batches_of(corpus))
    seen = Counter()
    for number in range(1, 51):
        seen.update(sources_of(corpus, next(iterator)))
        assert iterator.get_state() == {"next_index": number}
    assert seen == {"small": 150, "large": 60, "digits": 90}


def test_without_weights_one_pass_is_one_over_every_source(folders):
    corpus = corpus_of(folders, "text@{small}, text@{large}")
    assert corpus.weights is None
    sizes = {name: (len(store) - 1) // SEQ_LEN for name, store in corpus.train.items()}
    total = sum(sizes.values())
    batches = train_batches(corpus.train, None, SEQ_LEN, 1, 7)
    rows = [tuple(batch["inputs"][0]) for batch in itertools.islice(batches, 2 * total)]
    expected = Counter()
    for name, store in corpus.train.items():
        stream = store.read(0, len(store)).tolist()
        expected.update(tuple(stream[i * SEQ_LEN : (i + 1) * SEQ_LEN]) for i in range(sizes[name]))
    assert Counter(rows[:total]) == Counter(rows[total:]) == expected
    assert rows[:total] != rows[total:]


def test_sources_of_one_size_are_in_different_orders(folders):
    """If all corpora had the same seed, two corpora of equal size would have the same order."""
    copy = folders["cache"].parent / "copy"
    shutil.copytree(folders["large"], copy)
    corpus = corpus_of(folders | {"copy": copy}, "text@{large}, text@{copy}")
    first, second = (
        [batch["inputs"].tolist() for batch in itertools.islice(batches_of(corpus, rows=[row]), 20)]
        for row in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize("position", [1, 40, 100_000])
def test_position_is_restored_and_whole_batches_are_those_of_processes(corpus, position):
    iterator = iter(batches_of(corpus))
    if position < 100:
        for _ in range(position):
            next(iterator)
    else:
        iterator.set_state({"next_index": position})
    parts = [iter(batches_of(corpus, rows=rows)) for rows in ([0, 1, 2], [3, 4, 5])]
    for part in parts:
        part.set_state({"next_index": position})
    for _ in range(3):
        whole, halves = next(iterator), [next(part) for part in parts]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)


def test_one_vocabulary_is_trained_on_all(folders):
    corpus = corpus_of(folders, "text@{large}, text@{digits}", vocab_size=300)
    manifests = [store.manifest for split in SPLITS for store in getattr(corpus, split).values()]
    assert len({manifest["tokenizer_sha256"] for manifest in manifests}) == 1
    vocabulary = json.loads(corpus.tokenizer.read_text())["model"]["vocab"]
    assert any(len(token) > 1 and token.isdigit() for token in vocabulary)
    assert any(len(token) > 1 and set(token) <= set("xyz") for token in vocabulary)
    alone = corpus_of(folders, "text@{large}", vocab_size=300)
    assert alone.identities != corpus.identities[:1]


def prepared(folders, name, folder, **settings):
    """Copies the token store of a corpus to a folder with another name."""
    corpus = corpus_of(folders, f"text@{{{folder}}}", **settings)
    target = folders["cache"].parent / name
    return shutil.copytree(corpus.tokenizer.parent, target, dirs_exist_ok=True)


def test_prepared_stores_bring_their_tokenizer(folders):
    mine = prepared(folders, "mine", "large", vocab_size=300)
    here = folders | {"mine": mine}
    corpus = corpus_of(here, "prepared@{mine}=0.9, text@{digits}=0.1", vocab_size=512)
    assert list(corpus.train) == ["mine", "digits"]
    assert corpus.weights == (Fraction("0.9"), Fraction("0.1"))
    assert len({store.manifest["tokenizer_sha256"] for store in corpus.train.values()}) == 1
    assert corpus.identities[0] == corpus_of(folders, "text@{large}", vocab_size=300).identities[0]
    given = corpus_of(here, "prepared@{mine}", 512, tokenizer=str(mine / "tokenizer.json"))
    assert given.identities == corpus.identities[:1]
    same = mine.parent / "same.json"  # the same tokenizer in another form
    same.write_text(json.dumps(json.loads((mine / "tokenizer.json").read_text()), sort_keys=True))
    again = corpus_of(here, "prepared@{mine}, text@{digits}", 512, tokenizer=str(same))
    assert again.identities[0] == corpus.identities[0] and again.tokenizer == corpus.tokenizer
    elsewhere = folders | {"mine": mine, "cache": mine.parent / "elsewhere"}
    new = corpus_of(elsewhere, "prepared@{mine}, text@{digits}", 512, tokenizer=str(same))
    assert new.identities == again.identities  # another cache is no other corpus
    alone = open_corpus(DataConfig("prepared", path=str(mine)), 300)
    assert alone.identities == corpus.identities[:1] and list(alone.train) == ["mine"]


TWO = r"all corpora must have the same tokenizer, but .*mine has [0-9a-f]{12}"


def test_the_vocabulary_is_that_of_a_given_tokenizer(folders):
    mine, size = prepared(folders, "mine", "large", vocab_size=300), {"model": {"vocab_size": 512}}
    given = {"name": "text", "path": str(mine), "tokenizer": str(mine / "tokenizer.json")}
    for data in ({"name": f"sotu, prepared@{mine}"}, given):
        assert with_vocabulary(Config.from_config_dict({"data": data})).model.vocab_size == 300
        set_to = with_vocabulary(Config.from_config_dict({"data": data} | size)).model.vocab_size
        assert set_to == 512
    assert Config().model.vocab_size == 4096


@pytest.mark.parametrize(
    ("name", "tokenizer", "vocab_size", "words"),
    [
        ("prepared@{mine}, prepared@{other}", None, 512, TWO),
        ("prepared@{mine}", "other", 512, TWO),
        ("prepared@{mine}, text@{digits}", None, 280, r"vocab_size=280: the tokenizer has 300 tok"),
        ("prepared@{cache}, text@{digits}", None, 257, r"store '.*': manifest.json is missing"),
    ],
)
def test_prepared_stores_that_do_not_fit(folders, name, tokenizer, vocab_size, words):
    here = dict(folders)
    for store, (folder, size) in {"mine": ("large", 300), "other": ("digits", 290)}.items():
        here[store] = prepared(folders, store, folder, vocab_size=size)
    given = tokenizer and str(here[tokenizer] / "tokenizer.json")
    before = set((folders["cache"] / "tokens").iterdir())
    with pytest.raises(UserError, match=words):
        corpus_of(here, name, vocab_size, tokenizer=given)
    assert set((folders["cache"] / "tokens").iterdir()) == before


def test_damaged_shard_ends_the_batches_where_they_come_upon_it(folders, corpus):
    """After the shard is repaired, the batches continue as if there had been no damage."""
    expected = [batch["inputs"] for batch in itertools.islice(batches_of(corpus), 100)]
    shard = corpus.tokenizer.parent / "train-00000.array_record"
    whole, batches = shard.read_bytes(), iter(batches_of(corpus))
    found = [next(batches)["inputs"] for _ in range(10)]
    state = batches.get_state()
    damage(shard)
    token_store._reader.cache_clear()
    with pytest.raises(UserError, match=rf"{shard.parent}.*{shard.name}"):
        for _ in range(1000):
            next(batches)
    shard.write_bytes(whole)
    again = iter(batches_of(corpus))
    again.set_state(state)
    found += [next(again)["inputs"] for _ in range(90)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "text@/none"}, "data.path='/none': no such folder of .txt files"),
        ({"name": "prepared", "path": "/none"}, "token store '/none': there is no such folder"),
        ({"name": "text", "path": "/" + "x" * 300}, "config.data.path=/x*: File name too long"),
        ({"name": "text", "path": "gs://b/x"}, "config.data.path=gs://b/x: it must be on a disk"),
        ({"name": "text@gs://b/x"}, "config.data.name=gs://b/x: it must be on a disk"),
        ({"cache": "gs://b/x"}, "config.data.cache=gs://b/x: it must be on a disk"),
    ],
)
def test_paths_that_cannot_be_opened(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        open_corpus(DataConfig(**{"cache": str(tmp_path)} | settings), 300)


@pytest.mark.parametrize("path", ["~/texts", "texts"])
def test_paths_as_a_user_writes_them(monkeypatch, tmp_path, path):
    write_documents(tmp_path / "home" / "texts", "abc")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    corpus = open_corpus(DataConfig("text", path=path, cache="~/cache"), 300)
    assert corpus.tokenizer.parent.parent == tmp_path / "home" / "cache" / "tokens"

import hashlib
import itertools

import numpy as np
import pytest

from aoe_jax.data.building import build_token_store
from aoe_jax.data.pipeline import PackedWindows, eval_batches, train_batches
from aoe_jax.data.token_store import TokenStore
from aoe_jax.data.tokenizer import train_tokenizer
from aoe_jax.errors import UserError
from aoe_jax.training.validation import evaluate
from tests.data.texts import corpus_of


@pytest.fixture
def byte_store(tmp_path):
    """Makes a store of texts in which every byte is a token."""

    def make(*texts):
        build_token_store(corpus_of(*texts), train_tokenizer([], 257), tmp_path / "store")
        return TokenStore(tmp_path / "store", "train")

    return make


@pytest.fixture(scope="module")
def validation(sotu_directory):
    return TokenStore(sotu_directory, "validation")


@pytest.fixture(scope="module")
def stream(validation):
    return validation.read(0, len(validation))


def batches_of(store, seq_len, batch_size, seed, rows=None):
    return train_batches({"corpus": store}, None, seq_len, batch_size, seed, rows)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def rows(*batches):
    return sorted(tuple(row) for batch in batches for row in batch["inputs"].tolist())


def test_windows_are_slices_of_the_stream(validation, stream):
    windows = PackedWindows(validation, 96)
    assert len(windows) == (len(stream) - 1) // 96
    for i in [*range(100), len(windows) - 1]:
        window = windows[i]
        np.testing.assert_array_equal(window["inputs"], stream[i * 96 : i * 96 + 96])
        np.testing.assert_array_equal(window["targets"], stream[i * 96 + 1 : i * 96 + 97])
        assert window["weights"].tolist() == [1.0] * 96
        assert {name: array.dtype.name for name, array in window.items()} == {
            "inputs": "int32",
            "targets": "int32",
            "segment_ids": "int32",
            "weights": "float32",
        }


def test_segments_of_documents_shorter_and_longer_than_a_window(byte_store):
    store = byte_store("ab", "c", "defghijklmnop")  # 0ab0c0defghijklmnop0
    windows = PackedWindows(store, 6)
    assert [windows[i]["segment_ids"].tolist() for i in range(3)] == [
        [1, 1, 1, 2, 2, 3],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    last = list(eval_batches(store, 6, 2))[-1]
    assert last["segment_ids"].tolist() == [[1] * 6, [1, 0, 0, 0, 0, 0]]
    assert last["weights"].tolist() == [[1] * 6, [1, 0, 0, 0, 0, 0]]
    assert last["targets"][1].tolist() == [store.end_of_text, 0, 0, 0, 0, 0]


def test_loss_mask_weighs_first_tokens_of_documents_with_zero(byte_store):
    store = byte_store("ab", "c", "defghijklmnop")  # 0ab0c0defghijklmnop0
    windows, plain = PackedWindows(store, 6, loss_mask=True), PackedWindows(store, 6)
    assert [windows[i]["weights"].tolist() for i in range(2)] == [[0, 1, 1, 0, 1, 0], [1] * 6]
    for name in ("inputs", "targets", "segment_ids"):
        np.testing.assert_array_equal(windows[0][name], plain[0][name])
    (batch,) = take(train_batches({"corpus": store}, None, 6, 3, 0, loss_mask=True), 1)
    assert batch["weights"].sum() == 15 and batch["segment_ids"].all()


def test_batches_of_one_corpus_are_what_they_always_were(byte_store):
    """They must be bit-identical, because otherwise old runs would continue with other batches."""
    batches = take(batches_of(byte_store(*(f"{n} words. " * n for n in range(40))), 64, 8, 3), 50)
    digest = hashlib.sha256()
    for batch in batches:
        for name in ("inputs", "targets", "segment_ids", "weights"):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "0d0ce8bffee515b92695dac8e79d27ac446e58792f3e38ce8d57fa4e959f0106"


def test_each_epoch_has_every_window_in_another_order(byte_store):
    store = byte_store("".join(chr(33 + i) for i in range(90)))  # 91 targets, 30 windows of 3
    batches = take(batches_of(store, 3, 5, seed=1), 12)
    first, second = batches[:6], batches[6:]
    assert rows(*first) == rows(*second)
    assert len(set(rows(*first))) == 30
    assert [b["inputs"].tolist() for b in first] != [b["inputs"].tolist() for b in second]
    assert_same(take(batches_of(store, 3, 5, seed=1), 12), batches)
    other_seed = take(batches_of(store, 3, 5, seed=2), 6)
    assert rows(*other_seed) == rows(*first)
    assert [b["inputs"].tolist() for b in other_seed] != [b["inputs"].tolist() for b in first]


@pytest.mark.parametrize("position", [0, 7, 50])
def test_resume(validation, position):
    """The positions include one after the first epoch."""
    assert len(PackedWindows(validation, 2000)) < 4 * 50
    iterator = iter(batches_of(validation, 2000, 4, seed=3))
    take(iterator, position)
    resumed = iter(batches_of(validation, 2000, 4, seed=3))
    resumed.set_state({"next_index": position})
    assert_same(take(resumed, 4), take(iterator, 4))


@pytest.mark.parametrize(("seq_len", "batch_size"), [(128, 8), (1000, 3), (200_000, 2)])
def test_eval_has_each_target_once_in_order(validation, stream, seq_len, batch_size):
    batches = list(eval_batches(validation, seq_len, batch_size))
    assert all(
        array.shape == (batch_size, seq_len) for batch in batches for array in batch.values()
    )
    merged = {
        name: np.concatenate([batch[name].ravel() for batch in batches]) for name in batches[0]
    }
    real = merged["weights"] == 1
    assert merged["weights"].sum() == len(stream) - 1
    np.testing.assert_array_equal(merged["inputs"][real], stream[:-1])
    np.testing.assert_array_equal(merged["targets"][real], stream[1:])
    assert np.all(merged["segment_ids"][real] >= 1)
    assert all(not merged[name][~real].any() for name in merged)


def test_statistics_of_several_sources_are_of_all_tokens(validation, stream, byte_store):
    other = byte_store("a short text")

    def score(batch):  # the statistics are the mean token
        n_tokens = batch["weights"].sum()
        return 2 * n_tokens, n_tokens, batch["inputs"].sum() / n_tokens

    found = evaluate(score, {"long": validation, "short": other}, 128, 8, dict)
    inputs = [*stream[:-1], *other.read(0, len(other) - 1)]
    np.testing.assert_allclose(found.stats, np.mean(inputs), rtol=1e-6)
    assert found.nll == 2 and found.text_bytes == validation.text_bytes + other.text_bytes


def test_mistakes(byte_store):
    store = byte_store("a short text")
    words = r"data.seq_len=14: the train split of documents has 14 tokens"
    with pytest.raises(UserError, match=words):
        batches_of(store, 14, 4, seed=0)
    assert [len(PackedWindows(store, seq_len)) for seq_len in (13, 7)] == [1, 1]

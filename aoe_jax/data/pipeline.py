"""Batches of packed windows, read with Grain."""

from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from aoe_jax.data.token_store import TokenStore
from aoe_jax.errors import UserError


class PackedWindows:
    """Random access to the consecutive windows of a token stream.

    Window `i` covers tokens `i * L` to `i * L + L`, where `L` is `seq_len`; the last token of a window is the first of
    the next, so that each token after the first is a target once. The rest, which fills no window, is left out.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        """Raise `UserError` if the stream is shorter than one window."""
        if len(store) < seq_len + 1:
            raise UserError(
                f"data.seq_len={seq_len}: the {store.split} split has {len(store)} tokens; give a shorter seq_len "
                "or a larger corpus"
            )
        self._store = store
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Number of windows."""
        return (len(self._store) - 1) // self._seq_len

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Window `index`, as arrays `[L]`.

        `inputs` and `targets` are int32; `weights` is float32, all ones; `segment_ids`, int32, numbers the documents
        that the inputs belong to, from 1. A document begins at the end-of-text token before it.
        """
        start = index.__index__() * self._seq_len
        return _window(self._store.read(start, start + self._seq_len + 1), self._seq_len, self._store.end_of_text)


class _Rows:
    """Of each batch of `batch_size` elements, those of some rows, one after the other."""

    def __init__(self, elements, batch_size: int, rows: Sequence[int]):
        self._elements, self._batch_size, self._rows = elements, batch_size, rows

    def __len__(self) -> int:
        return len(self._elements) // self._batch_size * len(self._rows)

    def __getitem__(self, index: SupportsIndex):
        batch, row = divmod(index.__index__(), len(self._rows))
        return self._elements[batch * self._batch_size + self._rows[row]]


def train_batches(
    store: TokenStore, seq_len: int, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.IterDataset:
    """Endless training batches, in another order each epoch.

    Each element is a dictionary of arrays `[batch_size, seq_len]` as `PackedWindows` describes them, or `[len(rows),
    seq_len]` where `rows` names the rows of the batch that this process reads. Step `b` has the same windows in the same
    rows however many processes share them. Iterators save and restore their position, with `get_state` and `set_state`;
    the position is the number of batches, the same in every process.

    Raises:
        UserError: the stream is shorter than one window.
    """
    rows = range(batch_size) if rows is None else rows
    windows = grain.MapDataset.source(PackedWindows(store, seq_len)).shuffle(seed).repeat()
    # Grain's defaults, 16 threads and 500 elements, are meant for slow disks and single examples, not batches.
    read_options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)
    return grain.MapDataset.source(_Rows(windows, batch_size, rows)).batch(len(rows)).to_iter_dataset(read_options)


def eval_batches(store: TokenStore, seq_len: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches `[batch_size, seq_len]` that hold every token of the stream after the first as a target once, in order.

    The arrays are those of `PackedWindows`; positions beyond the end of the stream are zero in all of them, `weights`
    included, so `weights` sums to `len(store) - 1` over all batches.
    """
    targets = len(store) - 1
    for batch_start in range(0, targets, seq_len * batch_size):
        rows = []
        for start in range(batch_start, batch_start + seq_len * batch_size, seq_len):
            tokens = store.read(start, min(start + seq_len, targets) + 1) if start < targets else np.zeros(1, np.int32)
            rows.append(_window(tokens, seq_len, store.end_of_text))
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _window(tokens: np.ndarray, seq_len: int, end_of_text: int) -> dict[str, np.ndarray]:
    """Inputs, targets and what goes with them, from up to `seq_len + 1` consecutive tokens; the rest is zero."""
    inputs, targets = tokens[:-1], tokens[1:]
    begins = inputs == end_of_text
    begins[:1] = True

    def padded(values: np.ndarray | float, dtype: type) -> np.ndarray:
        column = np.zeros(seq_len, dtype)
        column[: len(targets)] = values
        return column

    return {
        "inputs": padded(inputs, np.int32),
        "targets": padded(targets, np.int32),
        "segment_ids": padded(np.cumsum(begins), np.int32),
        "weights": padded(1.0, np.float32),
    }

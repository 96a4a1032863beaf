"""Reads batches of packed windows from one corpus or a mixture of several, with Grain."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import SupportsIndex

import grain
import numpy as np

from aoe_jax.config.checks import require
from aoe_jax.data.token_store import TokenStore

# Grain's defaults, 16 threads and 500 elements, are too many, because an element is a batch here.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


class PackedWindows:
    """Random access to the consecutive windows of a token stream.

    Window `i` has tokens `i * L` to `i * L + L`, both included, where L is `seq_len`, so each
    token after the first is a target once. Tokens at the end that fill no window are left out.
    """

    def __init__(self, store: TokenStore, seq_len: int, loss_mask: bool = False):
        """Raises `UserError` if the stream is shorter than one window."""
        wanted = f"has {len(store)} tokens; give a shorter seq_len or a larger corpus"
        found = f"the {store.split} split of {store.manifest['corpus']} {wanted}"
        require(len(store) > seq_len, "data.seq_len", seq_len, found)
        self._store, self._seq_len, self._loss_mask = store, seq_len, loss_mask

    def __len__(self) -> int:
        return (len(self._store) - 1) // self._seq_len

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns arrays `[seq_len]` of window `index`. `inputs` and `targets` are int32 tokens.
        `segment_ids`, int32, numbers the documents in the window from 1: each token has the number
        of its document. `weights`, float32, are the weights of the targets in the loss.

        The segment of a document begins with the end-of-text token before it. With `loss_mask` the
        first token of a document has weight 0 as a target. All other weights are 1.
        """
        start = index.__index__() * self._seq_len
        tokens = self._store.read(start, start + self._seq_len + 1)
        windows = _windows(tokens, 1, self._seq_len, self._store.end_of_text)
        if self._loss_mask:
            windows["weights"][windows["inputs"] == self._store.end_of_text] = 0
        return {name: array[0] for name, array in windows.items()}


class Mixture:
    """Determines the order of the windows in an endless mixture of several sources.

    Of the first `position` windows, about `position * weight / total weight` are from a source. The
    exact numbers are computed in constant time, so a run can continue at any position.
    """

    def __init__(self, weights: Sequence[Fraction | int], batch_size=1, rows=(0,)):
        """`weights` are relative. A process reads only the rows `rows` of each batch."""
        scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        self._weights = [weight // math.gcd(*whole) for weight in whole]
        self._batch_size, self._rows = batch_size, rows

    def counts(self, position: int) -> list[int]:
        """Returns the number of windows of each source among the first `position` windows.

        The first source gets `position * weight / total weight` windows, rounded up. The remaining
        windows are divided among the other sources in the same way, one source after another. When
        `position` grows by one, exactly one count grows by one.
        """
        counts, left, left_weight = [], position, sum(self._weights)
        for weight in self._weights:
            after = left * (left_weight - weight) // left_weight
            counts.append(left - after)
            left, left_weight = after, left_weight - weight
        return counts

    def __len__(self) -> int:
        # More windows than any run reads. Grain converts 2**48 to float without rounding.
        return 2**48

    def __getitem__(self, index: SupportsIndex) -> tuple[int, int]:
        """Returns `(index of a source, index of its window)` for Grain's `select_from_datasets`."""
        batch, row = divmod(index.__index__(), len(self._rows))
        position = batch * self._batch_size + self._rows[row]
        before, after = self.counts(position), self.counts(position + 1)
        source = next(i for i, count in enumerate(before) if after[i] > count)
        return source, before[source]


def train_batches(
    stores: Mapping[str, TokenStore],
    weights: Sequence[Fraction] | None,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    loss_mask: bool = False,
) -> grain.DatasetIterator:
    """Yields training batches without end. A source has a new order in every epoch.

    A batch has the arrays of `PackedWindows`, `[len(rows), seq_len]`; `rows` are the rows of the
    global batch that this process reads, by default all. The global batch of a step does not depend
    on the number of processes. `set_state({"next_index": N})` continues after N batches.

    `weights` are the relative weights of the sources. If None, they are the numbers of windows, so
    that one pass over the mixture is one pass over every source. Raises `UserError` if a stream is
    shorter than one window.
    """
    rows = range(batch_size) if rows is None else rows
    windows = [PackedWindows(store, seq_len, loss_mask) for store in stores.values()]
    # The first source uses the seed itself, so a single source is shuffled as in old versions.
    seeds = [seed, *map(int, np.random.SeedSequence(seed).generate_state(len(windows) - 1))]
    shuffled = [
        grain.MapDataset.source(source).shuffle(seed).repeat()
        for source, seed in zip(windows, seeds, strict=True)
    ]
    # MapDataset.mix rounds weights to about 1%, so one pass over it would not read every window.
    mixture = Mixture(weights or [len(source) for source in windows], batch_size, rows)
    mixed = grain.MapDataset.select_from_datasets(shuffled, mixture)
    return iter(mixed.batch(len(rows)).to_iter_dataset(_READ_OPTIONS))


def eval_batches(
    store: TokenStore, seq_len: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches with the arrays of `PackedWindows` without loss mask: `[batch_size, seq_len]`.

    Every token after the first is a target once, in order. The last batch is padded with zeros; the
    padding has weight 0, so the `weights` of all batches sum to `len(store) - 1`.
    """
    size, end = seq_len * batch_size, len(store) - 1
    for start in range(0, end, size):
        tokens = store.read(start, min(start + size, end) + 1)
        yield _windows(tokens, batch_size, seq_len, store.end_of_text)


def _windows(
    tokens: np.ndarray, n_windows: int, seq_len: int, end_of_text: int
) -> dict[str, np.ndarray]:
    """Cuts tokens into windows: arrays `[n_windows, seq_len]`, padded with zeros at the end."""
    rows = np.zeros((3, n_windows * seq_len), np.int32)
    rows[:, : len(tokens) - 1] = tokens[:-1], tokens[1:], np.ones_like(tokens[1:])
    inputs, targets, is_real = rows.reshape(3, n_windows, seq_len)
    begins = inputs == end_of_text
    begins[:, 0] = True
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32) * is_real,
        "weights": is_real.astype(np.float32),
    }
